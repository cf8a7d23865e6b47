"""The pages in docs/levels show code that exists, and no stage writes into docs/."""

import ast
import re

import pytest
from ruamel.yaml import YAML

from helpers.common import REPOSITORY

PAGES = [page for page in sorted((REPOSITORY / "docs/levels").glob("*.md")) if page.name != "README.md"]


def code_of(line: str) -> str:
    """Return a line of source without its indentation and comment."""
    return line.partition("  # ")[0].strip()


def lines_of(path: str, name: str) -> set[str]:
    """Return the lines of code of `name` in a source file: a function, Class.method, or a variable of the module."""
    source = (REPOSITORY / path).read_text()
    body, node = ast.parse(source).body, None
    for part in name.split("."):
        (node,) = [
            item
            for item in body
            if getattr(item, "name", None) == part
            or (isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == part)
        ]
        body = getattr(node, "body", [])
    return {code_of(line) for line in source.splitlines()[node.lineno - 1 : node.end_lineno]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_line_of_a_pages_diff_is_in_the_function_that_it_names(page):
    (diff,) = re.findall(r"```diff\n(.*?)\n```", page.read_text(), re.DOTALL)
    assert diff.startswith("# ")
    for line in diff.splitlines():
        if header := re.fullmatch(r"# (\S+\.py): ([\w.]+)", line):
            known = {"...", *lines_of(*header.groups())}
        else:
            assert line[0] in "+- ", line
            assert code_of(line[1:]) in known, line


def test_no_stage_writes_into_docs():
    stages = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"].values()
    outputs = [output for stage in stages for kind in ("outs", "metrics") for output in stage.get(kind, ())]
    paths = [path for output in outputs for path in ([output] if isinstance(output, str) else output)]
    assert "results/report" in paths
    assert [path for path in paths if path.startswith("docs")] == []
