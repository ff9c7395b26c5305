"""The output directory of a run: there, writable, and nobody else's."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError
from bert_finetune.files import write_json
from bert_finetune.training import checkpoints

ARGUMENTS_FILE = "arguments.json"
_LOCK = ".lock"
_RESULTS = (
    *("train_results", "eval_results", "all_results"),
    *("predictions", "nbest_predictions", "null_odds"),
)


@contextlib.contextmanager
def locked(args: Arguments) -> Iterator[Path]:
    """Makes the output directory and keeps other runs out of it.

    Raises:
      UserError: if it cannot be written, another run is using it, or training would mix
        with what is there.
    """
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir} cannot be written: {error.strerror}."
        ) from None
    if args.do_train:
        _check_contents(args, output_dir)
    # The system lifts it with the process, however that ends.
    lock = filelock.FileLock(output_dir / _LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"another run is using --output_dir {output_dir}: wait for it, or give "
            "another directory."
        ) from None
    try:
        yield output_dir
    finally:
        lock.release()


def _check_contents(args: Arguments, output_dir: Path) -> None:
    wanted = args.resume_from_checkpoint
    is_of_here = wanted == "last" or (
        wanted is not None and Path(wanted).resolve().parent == output_dir.resolve()
    )
    if args.overwrite_output_dir or is_of_here:
        return
    contents = {path.name for path in output_dir.iterdir()} - {_LOCK}
    # A run that was killed before its first checkpoint has left nothing to lose.
    began_only = ARGUMENTS_FILE in contents and "model.safetensors" not in contents
    goes_on = wanted is None and checkpoints.find_checkpoints(output_dir)
    if contents and not goes_on and not began_only:
        raise UserError(
            f"--output_dir {output_dir} is not empty: give another one, or "
            "--overwrite_output_dir to train into it."
        )


def checkpoints_to_resume(args: Arguments, output_dir: Path) -> list[Path]:
    """Returns the checkpoints that training may go on from, the best choice first.

    Without `--resume_from_checkpoint` these are the ones in the output directory, as in
    Hugging Face's script, and none with `--overwrite_output_dir`.

    Raises:
      UserError: if the flag names no checkpoint.
    """
    wanted = args.resume_from_checkpoint
    found = checkpoints.find_checkpoints(output_dir)
    if wanted is None:
        return [] if args.overwrite_output_dir else found
    if wanted != "last":
        if not Path(wanted).is_dir():
            raise UserError(f"--resume_from_checkpoint {wanted} is no directory.")
        return [Path(wanted)]
    if not found:
        raise UserError(
            f"--resume_from_checkpoint: there is no checkpoint in {output_dir}."
        )
    return found


def begin(args: Arguments, output_dir: Path) -> None:
    """Removes the results of earlier runs, and writes down the flags of this one."""
    for name in _RESULTS:
        (output_dir / f"{name}.json").unlink(missing_ok=True)
    if args.overwrite_output_dir and args.resume_from_checkpoint is None:
        for path in checkpoints.find_checkpoints(output_dir):
            shutil.rmtree(path)
    write_json(output_dir / ARGUMENTS_FILE, dataclasses.asdict(args))
