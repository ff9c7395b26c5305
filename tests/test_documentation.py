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
PARSERS = {
    name: lambda flags, kind=kind: arguments.parse_arguments(kind, flags)
    for name, (_, kind) in run_seeds.SCRIPTS.items()
}
PARSERS["run_seeds"] = lambda flags: run_seeds.make_runs(run_seeds.parse_options(flags))


def test_the_blocks_of_the_readme_run():
    text, names = (ROOT / "README.md").read_text(), {}
    fences = re.findall(r"^```(.*)$", text, flags=re.M)
    assert fences == ["python", ""] * 3
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_resolve(page):
    text = prose_of(page)
    links = re.findall(r"\]\(<?([^)>\s]+)", text)
    links += re.findall(r"^\[[^\]]+\]: +(\S+)", text, flags=re.M)
    links += re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert (ROOT / target).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose_of(target), flags=re.M)
            assert anchor in map(slug_of, headings), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_parse(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for path in re.findall(r"python3? ((?:examples|benchmarks)/\S+\.py)", text):
        assert (ROOT / path).exists(), path
    commands = re.findall(r"^[\w ]*python3? examples/(\w+)\.py(.*)", text, re.M)
    for script, flags in commands:
        if script in PARSERS:
            PARSERS[script](shlex.split(flags))


def prose_of(page):
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)


def slug_of(heading):
    """Returns the anchor that GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
