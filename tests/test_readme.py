"""The code in the README and in the documentation runs."""

import pathlib
import re

import jax

import mfac_jax

ROOT = pathlib.Path(__file__).parents[1]


def blocks_of(path):
    text = (ROOT / path).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_python_block_runs_and_the_loop_learns():
    blocks, names = blocks_of("README.md"), {}
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
        ones = names["jnp"].ones
        names["optimizer"].init({"embedding": ones((900, 2)), "w": ones(3)})
    assert names["loss"] < 1e-3


def test_the_loops_of_scaling_run_and_split_their_windows():
    blocks, names = blocks_of("docs/scaling.md"), {}
    assert len(blocks) == 6
    for block in blocks:
        exec(block, names)
        leaves = jax.tree.leaves(names.get("state"), is_leaf=is_state)
        for state in filter(is_state, leaves):
            window = state.window["w"].values
            share = window.addressable_shards[0].data.shape[0]
            assert share == 16 // jax.device_count()
    assert names["loss"] < 0.1


def is_state(node):
    return isinstance(node, mfac_jax.ScaleByMFACState)
