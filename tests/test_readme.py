"""The code in the README runs."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_every_python_block_runs_and_the_loop_learns():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(block, names)
        ones = names["jnp"].ones
        names["optimizer"].init({"embedding": ones((900, 2)), "w": ones(3)})
    assert names["loss"] < 1e-3
