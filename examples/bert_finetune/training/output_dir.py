"""The output directory of a run."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax

from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError
from bert_finetune.files import write_json
from bert_finetune.training.checkpoints import step_of

ARGUMENTS_FILE = "arguments.json"
_LOCK = ".lock"
_RESULTS = (
    *("train_results", "eval_results", "all_results"),
    *("predictions", "nbest_predictions", "null_odds"),
)


@contextlib.contextmanager
def locked(args: Arguments) -> Iterator[Path]:
    """Creates the output directory and locks it against other runs.

    The first process does this for all; the others only check the contents.

    Raises a UserError if the directory cannot be written, is in use by another run, or
    has contents that training would mix with.
    """
    directory = Path(args.output_dir)
    if jax.process_index() > 0:
        if args.do_train and directory.exists():
            _check_contents(args, directory)
        yield directory
        return
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        what = f"--output_dir {directory} cannot be written"
        raise UserError(f"{what}: {error.strerror}.") from error
    if args.do_train:
        _check_contents(args, directory)
    try:
        # The system releases the lock however the process ends.
        lock = filelock.FileLock(directory / _LOCK).acquire(blocking=False)
    except filelock.Timeout as error:
        raise UserError(
            f"another run is using --output_dir {directory}: wait for it, or give "
            "another directory."
        ) from error
    with lock:
        try:
            yield directory
        except UserError:
            # A run that wrote nothing leaves nothing behind.
            if is_new and [path.name for path in directory.iterdir()] == [_LOCK]:
                (directory / _LOCK).unlink()
                directory.rmdir()
            raise


def _check_contents(args: Arguments, directory: Path) -> None:
    wanted = args.resume_from_checkpoint
    is_of_here = wanted == "last" or (
        wanted is not None and Path(wanted).resolve().parent == directory.resolve()
    )
    if args.overwrite_output_dir or is_of_here:
        return
    contents = {path.name for path in directory.iterdir()} - {_LOCK}
    # A run killed before its first checkpoint has left nothing to lose.
    began_only = ARGUMENTS_FILE in contents and "model.safetensors" not in contents
    resumes = wanted is None and any(step_of(Path(name)) for name in contents)
    if contents and not resumes and not began_only:
        raise UserError(
            f"--output_dir {directory} is not empty: give another one, or "
            "--overwrite_output_dir to train in it."
        )


def begin(args: Arguments, directory: Path) -> None:
    """Removes the results of earlier runs and writes the flags of this one."""
    if jax.process_index() > 0:
        return
    for name in _RESULTS:
        (directory / f"{name}.json").unlink(missing_ok=True)
    write_json(directory / ARGUMENTS_FILE, dataclasses.asdict(args))
