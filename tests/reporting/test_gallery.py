"""The gallery: every file in machines/ is valid, and the pages show its numbers."""

import json
import re

import pytest

from experiments import machines, pages
from gpt2_ladder.config import UserError
from gpt2_ladder.reporting import gallery
from helpers.common import REPOSITORY, measurement

FILES = sorted((REPOSITORY / "machines").glob("*"))
SMALLEST = {
    "version": 1,
    "title": "A machine",
    "commit": "17f2d6b",
    "date": "2026-11-26",
    "benchmark": measurement(fp32=[300.0] * 6, tf32=[150.0] * 6).model_dump(),
}


def parse(**changes: object) -> gallery.Machine:
    return gallery.parse(json.dumps({**SMALLEST, **changes}), gallery.FOLDER / "x.json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_the_gallery_is_valid(path):
    assert path.suffix == ".json"
    machine = gallery.read(path)
    assert len(machine.benchmark.rounds) >= 6
    assert machine.benchmark.noise().ratio == pytest.approx(
        1.0, abs=0.05
    )  # the control computes what the baseline does


def test_the_gallery_has_the_machines_of_the_readme():
    assert {f"{name}.json" for name in machines.IN_README} <= {path.name for path in FILES}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"commit": "main"}, "commit: String should match pattern"),
        ({"date": "yesterday"}, "date: Input should be a valid date"),
        ({"speed": 3}, "speed: Extra inputs are not permitted"),
        ({"notes": ["results in /home/me/ladder"]}, "'results in /home/me/ladder' contains a path or an address"),
        ({"notes": ["ask me@example.org"]}, "contains a path or an address"),
        ({"levels": {"fp32": {"note": r"no C:\Python"}}}, "contains a path or an address"),
        ({"title": "~me"}, "contains a path or an address"),
        ({"notes": ["x" * 200_001]}, "bytes; at most 200,000 are allowed"),
    ],
)
def test_a_file_with_a_mistake_or_something_private_is_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(**changes)


def test_words_with_slashes_are_not_paths():
    assert parse(notes=["tokens/s and TFLOP/s of a bare product, see https://example.org/page"]).notes


def test_a_file_that_is_missing_or_not_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):  # pipeline.run reports it
        gallery.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: the file: Invalid JSON"):
        gallery.read(tmp_path / "bad.json")


def test_what_a_machine_did_not_measure_is_named_so():
    climb = machines.Climb("x", parse())
    assert climb.cell("tf32", "over_previous") == "2.00 [2.00,\N{NO-BREAK SPACE}2.00]"
    assert climb.cell("bf16", "over_previous") == climb.cell("fp32", "peak_memory_mib") == machines.NOT_MEASURED
    assert "| A machine |" in machines.level_part("tf32", [climb])
    assert "A machine" not in machines.level_part("bf16", [climb])


@pytest.mark.slow
def test_make_docs_would_change_nothing(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for path, text in machines.contents().items():
        assert path.read_text() == text, f"{path} is not current: run make docs"


def test_only_the_text_between_two_markers_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- part -->\nold\n<!-- end of part -->\nbelow\n")
    assert pages.replace(page, "part", "new\n") == "above\n<!-- part -->\nnew\n<!-- end of part -->\nbelow\n"
    with pytest.raises(SystemExit, match="has 0 places for other"):
        pages.replace(page, "other", "new")
