"""Compiles the update for an NVIDIA H100 and counts kernels, reads and temporaries.

    pip install --no-deps jax-cuda13-pjrt==0.10.2 jax-cuda13-plugin==0.10.2
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/gpu_program.py

Needs no GPU and runs nothing: these packages contain the compiler. Their version must
be the version of jaxlib. `kernels` counts the kernels of an update, without the two
branches of the solve. `reads` is the mean number of times the program reads a byte of
the window; a step needs two. Small `temporaries` show that the window is updated in
place. `--devices 8` splits the window over eight H100s of a machine and reports one of
them; `travels` is the size of the operands of all collectives relative to the gradient.
Prints a table; `--output` appends each row to a file.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from step_time import CASES, Case
from tables import append_row

import mfac_jax

# Target description for the compiler, with the fields of XLA's own record of an H100.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ITEM_BITS = {"f32": 32, "bf16": 16, "f16": 16, "s8": 8, "u8": 8, "u16": 16, "u32": 32}


class Instruction(NamedTuple):
    """A line of a program in HLO, XLA's intermediate language."""

    name: str
    dtype: str
    shape: str
    operation: str
    operands: list[str]
    rest: str
    is_result: bool


def computations(program: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each computation; the program's entry is ENTRY."""
    found: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    line_pattern = re.compile(
        r" +(ROOT )?%([\w.-]+) = \(?(\w+)\[([\d,]*)\].*? ([a-z][\w-]*)\((.*?)\)(.*)"
    )
    for line in program.splitlines():
        if start := re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line):
            instructions = found["ENTRY" if start[1] else start[2]] = []
        elif match := line_pattern.match(line):
            root, name, dtype, shape, operation, inputs, rest = match.groups()
            operands = re.findall(r"[\w.-]+", re.sub(r"/\*.*?\*/", "", inputs))
            instructions.append(
                Instruction(
                    name, dtype, shape, operation, operands, rest, root is not None
                )
            )
    return found


def num_reads(
    program: dict[str, list[Instruction]], computation: str, name: str
) -> int:
    """Counts the reads of an entire array."""
    reads = 0
    for step in program[computation]:
        if name not in step.operands:
            continue
        if step.operation == "bitcast":
            reads += num_reads(program, computation, step.name)
        elif step.operation == "fusion":
            called = re.findall(r"calls=%([\w.-]+)", step.rest)[0]
            position = [str(step.operands.index(name))]
            (inside,) = (
                x.name
                for x in program[called]
                if x.operation == "parameter" and x.operands == position
            )
            # A kernel that uses an element twice keeps it in registers.
            reads += min(1, num_reads(program, called, inside))
        elif step.operation == "tuple" and step.is_result:
            continue
        elif step.operation not in ("dynamic-slice", "dynamic-update-slice"):
            reads += 1  # The exceptions access one row.
    return reads


def reads_of_window(program: dict[str, list[Instruction]]) -> float:
    """Returns the bytes of the window that are read, relative to its size."""
    total = read = 0
    for step in program["ENTRY"]:
        is_window = 'op_name="state.window' in step.rest
        # Counters are scalars, with an empty shape.
        if step.operation == "parameter" and is_window and step.shape:
            size = math.prod(map(int, step.shape.split(",")))
            total += size * ITEM_BITS[step.dtype]
            reads = num_reads(program, "ENTRY", step.name)
            read += reads * size * ITEM_BITS[step.dtype]
    return read / total


def bytes_travelling(program: dict[str, list[Instruction]]) -> int:
    """Returns the bytes of the operands of all collectives."""
    steps = [step for part in program.values() for step in part]
    names = "all-gather all-reduce reduce-scatter all-to-all collective-permute".split()
    operands = {
        operand
        for step in steps
        if step.operation.removesuffix("-start") in names
        for operand in step.operands
    }
    return sum(
        math.prod(map(int, filter(None, step.shape.split(","))))
        * ITEM_BITS[step.dtype]
        // 8
        for step in steps
        if step.name in operands
    )


def measure(case: Case, devices: Any) -> dict[str, float]:
    """Compiles the donated update of a case with its window split over devices."""
    mesh = Mesh(devices, ("data",))
    optimizer = mfac_jax.scale_by_mfac(
        case.num_grads, window=case.window, window_axis="data"
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = {
        k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=everywhere)
        for k, s in case.shapes.items()
    }
    shardings = mfac_jax.state_shardings(optimizer, params, mesh, "data")
    with jax.set_mesh(mesh):
        state: Any = jax.tree.map(
            lambda x, sharding: x.update(sharding=sharding),
            jax.eval_shape(optimizer.init, params),
            shardings,
        )
        update: Any = jax.jit(
            optimizer.update, donate_argnums=1, out_shardings=(everywhere, shardings)
        )
        lowered = update.trace(params, state).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile()
    program = computations(compiled.as_text())
    gradient = sum(4 * math.prod(shape) for shape in case.shapes.values())
    return {
        "num_grads": case.num_grads,
        "window_mb": mfac_jax.window_nbytes(state) / len(devices) / 1e6,
        "travels": bytes_travelling(program) / gradient,
        "kernels": sum(
            step.operation in ("fusion", "copy", "custom-call", "sort")
            for step in program["ENTRY"]
        ),
        "reads": reads_of_window(program),
        "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }


def main() -> None:
    """Prints each row of the table as soon as it is compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Append rows to this file.")
    args = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x1x{args.devices}",
        target_config=H100,
    )
    print("| window | m | MB | kernels | reads | temporaries | travels |")
    print("| --- |" + " ---: |" * 6)
    for name in args.cases:
        found = measure(CASES[name], topology.devices)
        print(
            f"| {name} | {found['num_grads']} | {found['window_mb']:,.0f} | "
            f"{found['kernels']} | {found['reads']:.2f} | "
            f"{found['temporaries_mb']:.0f} MB | {found['travels']:.3f} |",
            flush=True,
        )
        row = {"window": name, "devices": args.devices, **found}
        append_row(args.output, {**row, "compiled_for": "NVIDIA H100"})


if __name__ == "__main__":
    main()
