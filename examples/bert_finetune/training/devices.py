"""The mesh of a run: the devices of all its processes.

Parameters are replicated over the mesh and batches are split over it. Without a mesh in
context (`jax.set_mesh`), the mesh is the first device.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError, first_line

AXIS = "data"


def join(args: Arguments) -> None:
    """Joins the processes of a run; call it before anything touches a device."""
    if not args.is_distributed or jax.distributed.is_initialized():
        return
    # Only training polls for preemption; otherwise SIGTERM must keep its default.
    config: Any = jax.config
    config.update("jax_enable_preemption_service", args.do_train)
    timeout = args.heartbeat_timeout_seconds
    try:
        jax.distributed.initialize(
            args.coordinator_address,
            args.num_processes,
            args.process_id,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes cannot be joined: {first_line(error)} Give "
            "--coordinator_address, --num_processes and --process_id, or launch all "
            "processes with Slurm or Open MPI and --distributed."
        ) from error
    # XLA ends a process whose peer died; its message only names the peer.
    print(
        f"Process {jax.process_index()} of {jax.process_count()} has joined. If "
        f"another one dies, this one ends within about {timeout} s; rerun the same "
        "command to resume from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )


def make_mesh(num_devices: int | None) -> Mesh:
    """Returns the mesh of ``num_devices`` devices of each process, or of all."""
    devices = []
    for process in range(jax.process_count()):
        local = jax.local_devices(process)
        if num_devices is not None and num_devices > len(local):
            raise UserError(
                f"--num_devices must be at most {len(local)}, the devices of process "
                f"{process}, got {num_devices}."
            )
        devices += local[:num_devices]
    return _mesh_of(devices)


def mesh() -> Mesh:
    """Returns the mesh in context, or a mesh of the first device."""
    current = jax.sharding.get_mesh()
    return _mesh_of(jax.local_devices()[:1]) if current.empty else current


def _mesh_of(devices: Sequence[Any]) -> Mesh:
    axis_types = (AxisType.Auto,)
    return jax.make_mesh((len(devices),), (AXIS,), axis_types, devices=devices)


def count() -> int:
    """Returns the number of devices of all processes."""
    return mesh().size


def sharding(*axes: str | None) -> NamedSharding:
    """Returns the sharding over these axes of the mesh; replicated without axes."""
    return NamedSharding(mesh(), PartitionSpec(*axes))


def put(tree: Any, *axes: str | None) -> Any:
    """Places arrays with this sharding; each process passes the full arrays."""
    placement = sharding(*axes)

    def place(x: Any) -> jax.Array:
        return jax.make_array_from_callback(x.shape, placement, x.__getitem__)

    return jax.tree.map(place, jax.tree.map(np.asarray, tree))


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Jits ``(params, batch) -> outputs``: batches are split, outputs replicated."""

    @functools.cache
    def jitted(replicated: NamedSharding) -> Callable[..., Any]:
        return jax.jit(function, out_shardings=replicated)

    return lambda params, batch: jitted(sharding())(params, put(batch, AXIS))


@contextlib.contextmanager
def one_console() -> Iterator[None]:
    """Silences all processes except the first; errors are still raised."""
    if jax.process_index() == 0:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
