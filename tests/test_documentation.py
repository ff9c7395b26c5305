"""Checks the pages: the README's code runs, links resolve, commands parse.

The code of the other pages runs when the documentation is built (`make docs`).
"""

import pathlib
import re
import shlex

import pytest
import run_seeds
from bert_finetune import arguments

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "tests/*/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def test_the_blocks_of_the_readme_run():
    text, names = (ROOT / "README.md").read_text(), {}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_resolve(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page.parent / path) if path else ROOT / page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug_of, headings), target


def slug_of(heading):
    """Returns the anchor that GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_parse(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^ *python examples/(run_\w+)\.py(.*)", text, re.M)
    for script, flags in commands:
        flags = shlex.split(flags)
        if script == "run_seeds":
            run_seeds.make_runs(run_seeds.parse_options(flags))
        elif script in run_seeds.SCRIPTS:
            _, kind = run_seeds.SCRIPTS[script]
            arguments.parse_arguments(kind, flags)
