"""Runs the blocks of a page that need nothing but what `mfac_jax` installs."""

import pathlib
import platform
import re
import sys

import jax
import optax

import mfac_jax

names: dict[str, object] = {}
blocks = re.findall(
    r"```python\n(.*?)```", pathlib.Path(sys.argv[1]).read_text(), flags=re.DOTALL
)
blocks = [block for block in blocks if not re.search(r"import (flax|nnx|orbax)", block)]
if not blocks:
    sys.exit("error: the page has no block to run.")
for block in blocks:
    exec(block, names)
print(
    f"Python {platform.python_version()}, jax {jax.__version__}, "
    f"optax {optax.__version__}: {len(blocks)} blocks ran, "
    f"{pathlib.Path(mfac_jax.__file__).parent}"
)
