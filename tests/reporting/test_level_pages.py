"""The generated pages show this machine's numbers; the written ones in docs/levels show code that exists."""

import ast
import re

import pytest
from ruamel.yaml import YAML

from gpt2_ladder.reporting import level_pages
from helpers.common import REPOSITORY
from helpers.results import LEVELS, SKIPPED, TRAINED, ladder, profiled

EXPLAINED = [path for path in sorted((REPOSITORY / "docs/levels").glob("*.md")) if path.name != "README.md"]


def pages(**changes: object) -> dict[str, str]:
    return level_pages.pages(ladder(**changes), {"bf16"})


def test_every_level_has_a_generated_page_and_links_to_its_written_one():
    rendered = pages(levels={**LEVELS, "mine": LEVELS["padded"]})
    assert rendered.keys() == {"README.md", "mine.md", *(f"{name}.md" for name in LEVELS)}
    assert "[docs/levels/bf16.md](../../../docs/levels/bf16.md)" in rendered["bf16.md"]
    assert "docs/levels" not in rendered["mine.md"]
    assert "[`mine`](mine.md)" in rendered["README.md"]


def test_a_page_shows_the_row_the_gain_and_where_it_was_measured():
    page = pages()["bf16.md"]
    assert "-precision: tf32\n+precision: bf16\n" in page
    assert "| over the previous level | no measurable gain [1.00, 1.00] | 2.00 [1.99, 2.01] |" in page
    assert "4 rounds with one step of each level, 2 x 256 tokens, on A processor (cpu, 2 threads), torch 2." in page


def test_the_page_of_a_skipped_level_shows_the_reason():
    page = pages(results=dict.fromkeys(LEVELS, TRAINED) | {"flash": SKIPPED})["flash.md"]
    assert "- no compiler" in page
    assert "## Profile\n\nNot profiled" in page


def test_the_profile_lists_the_operators_that_changed():
    steps = {"fp32": {"mm": 9}, "tf32": {"mm": 8, "add": 2}, "bf16": {"mm": 5, "cast": 5}}
    rendered = pages(operators={level: profiled(self_ms) for level, self_ms in steps.items()})
    rows = [line.split() for line in rendered["bf16.md"].splitlines() if line.startswith("| `")]
    # operator, calls of tf32 and bf16, ms of both
    assert ["|", "`cast`", "|", "0", "|", "3", "|", "0", "|", "75", "|"] in rows
    assert {row[1] for row in rows} == {"`mm`", "`cast`", "`add`"}
    # the gain of tf32 may be noise, so a change in the time of `mm`, which was called as often, may be too
    assert "| `add` " in rendered["tf32.md"]
    assert "| `mm` " not in rendered["tf32.md"]


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


@pytest.mark.parametrize("page", EXPLAINED, ids=lambda page: page.stem)
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
