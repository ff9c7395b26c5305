"""Checkpoints of a training run, to resume it from.

`checkpoint-STEP` in the output directory is a model directory as `transformers` loads
it, and beside the model holds `state/`, everything a training step changes, written by
orbax, and `trainer_state.json`, what the loop around it knows. It appears whole, by one
rename, or not at all.
"""

import inspect
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint

import mfac_jax
from bert_finetune.errors import UserError
from bert_finetune.files import write_json
from bert_finetune.training import optimizers
from bert_finetune.training.steps import TrainState

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "state"
_TRAINER_STATE = "trainer_state.json"
_STAGING = ".saving-checkpoint"
# In the middle of a long sentence of tensorstore's.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used; the message says why."""


def find_checkpoints(output_dir: Path, up_to: float = math.inf) -> list[Path]:
    """Returns the checkpoint directories of steps up to one, newest first."""
    numbered = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for step, path in sorted(numbered, reverse=True) if step <= up_to]


def save(
    output_dir: Path,
    state: TrainState,
    trainer_state: Mapping[str, Any],
    save_model: Callable[[Path], None],
    *,
    with_window: bool,
) -> Path:
    """Writes `checkpoint-STEP` and returns its path.

    Args:
      output_dir: of the run.
      state: its ``step`` names the directory.
      trainer_state: JSON, comes back from :func:`restore`.
      save_model: writes the model into a directory.
      with_window: whether M-FAC's gradients and their Gram matrix are kept.

    Raises:
      CheckpointError: if it cannot be written; older checkpoints are as they were.
    """
    path = output_dir / f"checkpoint-{int(state.step)}"
    staging = output_dir / _STAGING
    kept = (
        state
        if with_window or not window_nbytes(state)
        else mfac_jax.drop_windows(state)
    )

    def write() -> None:
        clean_up(output_dir)
        staging.mkdir()
        save_model(staging)
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save((staging / _STATE).absolute(), kept)
        entries = {
            **trainer_state,
            "has_window": kept is state,
            "files": _file_sizes(staging),
        }
        write_json(staging / _TRAINER_STATE, entries)
        _sync(staging)
        if path.exists():  # The run was resumed before it.
            os.replace(path, output_dir / f"{_STAGING}-old")
        os.replace(staging, path)
        clean_up(output_dir)

    if problem := _problem_of(write):
        free = shutil.disk_usage(output_dir).free
        clean_up(output_dir)
        raise CheckpointError(
            f"{path} cannot be written: {problem} ({free / 1e9:.1f} GB of the disk are "
            "free)."
        )
    return path


def restore(
    path: Path,
    init_state: Callable[[], TrainState],
    fingerprint: Mapping[str, Any],
) -> tuple[TrainState, dict[str, Any]]:
    """Reads a checkpoint back.

    Args:
      path: of its directory.
      init_state: makes the state before the first step, whose shapes it must have.
      fingerprint: what ``trainer_state["fingerprint"]`` must be for the run to go on as
        it would have.

    Returns:
      The state, and what was given to :func:`save` as ``trainer_state``.

    Raises:
      CheckpointError: if it is torn, or of another run.
    """
    try:
        trainer_state = json.loads((path / _TRAINER_STATE).read_text())
        files = trainer_state["files"]
        saved = trainer_state["fingerprint"]
        has_window = trainer_state["has_window"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is not a checkpoint of this trainer: it has no whole "
            f"{_TRAINER_STATE}."
        ) from None
    sizes = _file_sizes(path)
    torn = [name for name, size in files.items() if sizes.get(name) != size]
    if torn:
        raise CheckpointError(f"{path} is torn: {torn[0]} is not as it was written.")
    for name, value in fingerprint.items():
        if saved.get(name, value) != value:
            raise CheckpointError(
                f"{path} is of another run: {name} was {saved[name]!r} there and is "
                f"{value!r} now."
            )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(init_state),
    )
    restored = []

    def read() -> None:
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            restored.append(
                checkpointer.restore(
                    (path / _STATE).absolute(),
                    shapes if has_window else mfac_jax.drop_windows(shapes),
                )
            )

    if problem := _problem_of(read):
        raise CheckpointError(f"{path} cannot be read: {problem}.")
    [state] = restored
    if not has_window:
        state = mfac_jax.refill_windows(state, init_state())
    return state, trainer_state


def remove_old(output_dir: Path, step: int, limit: int, best: str | None) -> None:
    """Removes the checkpoints before a step but the newest ``limit`` and the best.

    Later ones are there if the run was resumed before them; it will come to them.
    """
    for path in find_checkpoints(output_dir, up_to=step)[limit:]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)


def window_nbytes(state: TrainState) -> int:
    """Returns the bytes that a checkpoint saves by leaving out M-FAC's gradients."""
    return optimizers.nbytes(state) - optimizers.nbytes(mfac_jax.drop_windows(state))


def clean_up(output_dir: Path) -> None:
    """Removes what a run that was killed while saving has left."""
    for path in output_dir.glob(".saving-*"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Waits until the disk has everything, lest a power cut leave an empty shell."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _problem_of(action: Callable[[], None]) -> str | None:
    """Does something with orbax; returns in one line why it failed, if it did.

    Orbax raises, and also logs and lets its threads and tasks print what they raise.
    """
    problem = None
    hooks = threading.excepthook, sys.unraisablehook
    threading.excepthook = sys.unraisablehook = lambda args: None
    logging.disable(logging.CRITICAL)
    try:
        action()
    except Exception as error:
        match = _OS_ERROR.search(str(error))
        problem = os.strerror(int(match[1])) if match else str(error).strip()
        problem = problem.partition("\n")[0] or type(error).__name__
        # Tasks that orbax abandons report themselves much later.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.disable(logging.NOTSET)
    threading.excepthook, sys.unraisablehook = hooks
    if problem is not None:
        sys.unraisablehook = _without_abandoned_writes(sys.unraisablehook)
    return problem


def _without_abandoned_writes(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Writes that orbax abandons end when they like, and miss their event loop."""

    def filtered(unraisable: Any) -> None:
        is_closed_loop = str(unraisable.exc_value) == "Event loop is closed"
        if not (is_closed_loop or inspect.iscoroutine(unraisable.object)):
            hook(unraisable)

    return filtered


def _file_sizes(directory: Path) -> dict[str, int]:
    return {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != _TRAINER_STATE
    }
