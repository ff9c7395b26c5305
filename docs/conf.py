"""Configuration of Sphinx, which executes the Python blocks of every page."""

import os
import pathlib
from importlib import metadata

project = "mfac_jax"
author = "The mfac_jax authors"
release = metadata.version("mfac_jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "sphinx_book_theme"
html_title = f"mfac_jax {release}"
html_static_path = ["_static"]
exclude_patterns = ["_build"]

# Pages are plain Markdown, which GitHub renders as well; ```python blocks are cells.
nb_custom_formats = {".md": ["jupytext.reads", {"fmt": "md"}]}
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True
# Our kernel: eight CPU devices, and no warning that its TCP sockets are not encrypted.
os.environ["JUPYTER_PATH"] = str(pathlib.Path(__file__).parent / "_kernel")

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
nitpicky = True
# Links into the documentation of other projects need a download.
nitpick_ignore_regex = [("py:.*", r"(?!mfac_jax).*")]
nitpick_ignore = [("py:class", "mfac_jax.windows._protocol._Row")]  # A type variable.
