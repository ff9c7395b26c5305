"""Time and memory of one update, as ratios to the two bare products it consists of.

    python benchmarks/step_time.py --num_grads 256 --size 1000000

A step cannot be faster than two reads of the window. Their price is measured in the
same process: one matrix-vector product `G g` and one combination `c G` of the array.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mfac_jax
from mfac_jax import _dense_window


def best_time(call: Callable[[], object], repeats: int) -> float:
    """Returns the shortest of ``repeats`` times, in seconds, after one warm-up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


def measure(num_grads: int, size: int, repeats: int) -> dict[str, float]:
    """Measures update and bare products for one leaf of ``size`` numbers."""
    shape = (size // 128, 128)
    gradient = jax.random.normal(jax.random.key(0), shape)
    opt = mfac_jax.scale_by_mfac(num_grads)
    update = jax.jit(opt.update, donate_argnums=1)
    state: Any = opt.init(gradient)
    memory: Any = update.lower(gradient, state).compile().memory_analysis()
    for i in range(4):
        _, state = update(jax.random.normal(jax.random.key(i), shape), state)

    def step():
        nonlocal state
        direction, state = update(gradient, state)
        return direction

    step_time = best_time(step, repeats)
    flat = jnp.reshape(state.window, (num_grads, -1))
    del state
    vector, coefficients = gradient.ravel(), jnp.ones(num_grads)
    product = jax.jit(lambda g, x: jnp.matmul(g, x, precision="highest"))
    product_time = best_time(lambda: product(flat, vector), repeats)
    combination_time = best_time(lambda: product(coefficients, flat), repeats)

    window = jax.random.uniform(jax.random.key(1), (8, *shape), minval=0.5)
    exact = np.asarray(window, np.float64).reshape(8, -1)
    exact = exact @ exact[0]
    errors = {
        "row_products": _dense_window.DenseGradients(window).products(
            window[0], jnp.float32
        ),
        "bare_product": product(window.reshape(8, -1), window[0].ravel()),
    }
    return {
        "num_grads": num_grads,
        "size": size,
        "update_ms": 1e3 * step_time,
        "bare_products_ms": 1e3 * (product_time + combination_time),
        "ratio": step_time / (product_time + combination_time),
        "read_gb_per_s": 2 * flat.nbytes / step_time / 1e9,
        "temporaries_in_gradients": memory.temp_size_in_bytes / gradient.nbytes,
        **{
            f"{name}_error": float(np.max(np.abs(value - exact) / exact))
            for name, value in errors.items()
        },
    }


def environment() -> dict[str, str]:
    """Returns device and versions."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Prints one JSON object: the measurement, the device and the versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_grads", type=int, default=256)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    result = {
        **measure(args.num_grads, args.size, args.repeats),
        **environment(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
