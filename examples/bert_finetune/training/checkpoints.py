"""Saves and restores the checkpoints of a training run, with orbax.

`checkpoint-STEP` in the output directory is a model directory that `transformers`
loads. It also holds `state/`, everything a training step changes, and `loop/`, what the
training loop needs to resume.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

import mfac_jax
from bert_finetune.training.memory import nbytes
from bert_finetune.training.steps import TrainState

_NAME = re.compile(r"checkpoint-(\d+)")


class _Names(ocp.path.step.NameFormat):
    """Names checkpoints as the Hugging Face `Trainer` does."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path: Any) -> Iterator[ocp.path.step.Metadata]:
        for path in Path(base_path).iterdir():
            match = _NAME.fullmatch(path.name)
            if match and ocp.path.step.is_path_finalized(epath.Path(path)):
                yield ocp.path.step.Metadata(int(match[1]), epath.Path(path))

    def find_step(self, base_path: Any, step: int) -> ocp.path.step.Metadata:
        return next(found for found in self.find_all(base_path) if found.step == step)


def step_of(path: Path) -> int | None:
    """Returns the step of a checkpoint directory, from its name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def open_manager(
    directory: Path,
    *,
    limit: int = 1,
    best_metric: str | None = None,
    read_only: bool = False,
) -> ocp.CheckpointManager:
    """Opens a checkpoint manager for a directory.

    It keeps the newest ``limit`` checkpoints and the best by ``best_metric``: the
    lowest for a loss or an error, otherwise the highest.
    """
    policies: Any = ocp.checkpoint_managers
    keep = [policies.LatestN(limit)]
    lowest = best_metric is not None and best_metric.endswith(("loss", "mse"))
    worst = math.inf if lowest else -math.inf

    def best_fn(results: Mapping[str, float]) -> float:
        # Non-finite results are not saved.
        return results.get(best_metric or "", worst)

    if best_metric is not None:
        others: dict[str, Any] = {"n": 1, "keep_checkpoints_without_metrics": False}
        keep.append(policies.BestN(get_metric_fn=best_fn, reverse=lowest, **others))
    options = ocp.CheckpointManagerOptions(
        step_name_format=_Names(),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=best_fn if best_metric is not None else None,
        best_mode="min" if lowest else "max",
        cleanup_tmp_directories=True,
        # Errors are raised in `save`, where the loop handles them.
        enable_async_checkpointing=False,
        save_root_metadata=False,
    )
    if read_only:  # Orbax's own flag logs warnings; these options write nothing.
        options = ocp.CheckpointManagerOptions(
            step_name_format=_Names(), create=False, save_root_metadata=False
        )
    return ocp.CheckpointManager(
        directory.absolute(), options=options, item_names=("state", "loop")
    )


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    loop_state: Mapping[str, Any],
    results: Mapping[str, float],
    *,
    with_window: bool,
) -> Path:
    """Writes `checkpoint-STEP` atomically; returns its path.

    ``loop_state`` is what the loop needs to resume, as JSON. ``results`` are the
    evaluation results at this step, if any. ``with_window`` keeps M-FAC's gradients and
    their Gram matrix.
    """
    step = int(state.step)
    has_window = with_window or not window_nbytes(state)
    kept = state if has_window else mfac_jax.drop_windows(state)
    finite = {name: value for name, value in results.items() if math.isfinite(value)}
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(kept),  # pyright: ignore[reportCallIssue]
            loop=ocp.args.JsonSave({**loop_state, "has_window": has_window}),  # pyright: ignore[reportCallIssue]
        ),
        metrics=finite or None,
        force=True,
    )
    return Path(manager.directory, f"checkpoint-{step}")


def read_loop_state(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Returns the ``loop_state`` given to :func:`save`."""
    item = ocp.args.JsonRestore()
    return manager.restore(step, args=ocp.args.Composite(loop=item))["loop"]


def read_state(
    manager: ocp.CheckpointManager,
    step: int,
    shapes: TrainState,
    init_state: Callable[[], TrainState],
    has_window: bool,
) -> TrainState:
    """Restores the state of a checkpoint, with these shapes and shardings.

    ``has_window`` is from the loop state; if false, M-FAC starts with the empty window
    of the initial state.
    """
    if not has_window:
        shapes = mfac_jax.drop_windows(shapes)
    item = ocp.args.StandardRestore(shapes)  # pyright: ignore[reportCallIssue]
    state = manager.restore(step, args=ocp.args.Composite(state=item))["state"]
    return state if has_window else mfac_jax.refill_windows(state, init_state())


def window_nbytes(state: TrainState) -> int:
    """Returns the bytes that a checkpoint saves by leaving out M-FAC's gradients."""
    return nbytes(state) - nbytes(mfac_jax.drop_windows(state))
