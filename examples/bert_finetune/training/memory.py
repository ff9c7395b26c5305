"""Checks that the state of an optimizer fits in memory."""

from pathlib import Path
from typing import Any

import jax
import psutil

import mfac_jax
from bert_finetune.errors import UserError
from bert_finetune.training import devices, steps
from bert_finetune.training.optimizers import Optimizer

# In addition to the optimizer's state: parameters, gradient, update and activations of
# a batch, in units of the parameters.
_WORKING_COPIES = 4
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def nbytes(tree: Any) -> int:
    """Returns the total bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def on_device(shapes: Any) -> Any:
    """Returns the shapes of the shards on one device."""

    def part(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    return jax.tree.map(part, shapes)


def check_memory(optimizer: Optimizer, params: Any) -> None:
    """Raises a UserError unless the optimizer's state fits; allocates nothing.

    Counts the memory of one device; CPU devices share the memory of the host.
    """
    num_devices, num_sharing = devices.count(), 1
    if jax.default_backend() == "cpu":
        num_sharing = num_devices // jax.process_count()
    shapes = steps.state_shapes(params, optimizer.transformation).opt_state
    shapes = on_device(shapes)
    copy = num_sharing * nbytes(params)
    state, working = num_sharing * nbytes(shapes), _WORKING_COPIES * copy
    available = available_memory()
    if state + working <= available:
        return
    message = (
        f"the state of {optimizer.name} takes {state / 1e9:.1f} GB and training "
        f"needs about {working / 1e9:.1f} GB more, but {available / 1e9:.1f} GB of "
        "memory are available."
    )
    if num_grads := optimizer.hyperparams.get("num_grads"):
        window = num_sharing * mfac_jax.window_nbytes(shapes)
        # Minus one gradient: a top-k window also keeps an error of that size.
        for_window = available - working - (state - window) - copy
        fitting = max(0, for_window * num_grads // window)
        fitting -= fitting % num_devices
        message += (
            f" Its window holds num_grads = {num_grads} gradients; {fitting} would "
            "fit: lower num_grads in --optim_args."
        )
    raise UserError(message)


def available_memory() -> int:
    """Returns the bytes that can still be allocated on the first device."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    available = psutil.virtual_memory().available
    for limit_file in _CGROUP_LIMITS:
        try:
            limit = int(Path(limit_file).read_text())
        except (OSError, ValueError):
            continue  # Another version of cgroups, or "max": no limit.
        available = min(available, limit - psutil.Process().memory_info().rss)
    return available
