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
        ({"notes": ["x" * 200_001]}, "characters; at most 200,000 are allowed"),
        ({"benchmark": measurement(fp32=[300.0] * 5).model_dump()}, "needs 6 rounds"),
        (
            {"benchmark": measurement(fp32=[300.0] * 5 + [0.0]).model_dump()},
            "with positive times of every level and the control",
        ),
        ({"benchmark": measurement(tf32=[300.0] * 6).model_dump()}, "first fp32"),
        ({"benchmark": SMALLEST["benchmark"] | {"levels": ["fp32", "bf16"]}}, "of every level and the control"),
        *(
            ({"notes": [text]}, "contains a path, an address or a special character; remove it")
            for text in (
                *(
                    "results in /home/me/ladder",
                    "file:///home/me",
                    "log:/home/me",
                    "home/me",
                    "../me",
                    "~/me",
                    "$HOME/x",
                ),
                *("C:/Users/me", r"C:\Users", r"\\server\share", "me@example.org", "gpu07.cluster.local", "10.0.0.3"),
                *("s3://bucket", "a | b", "two\nlines", "<!-- end of machines -->"),
            )
        ),
        ({"title": "a/b | c"}, "contains a path"),
        ({"levels": {"fp32": {"attention_kernel": "/opt/x"}}}, "'/opt/x' contains a path"),
    ],
)
def test_a_file_with_a_mistake_or_something_private_is_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(**changes)


def test_words_with_slashes_are_not_paths():
    assert parse(notes=["tokens/s and TFLOP/s of a bare product, see https://example.org/page"]).notes


def test_a_file_that_is_missing_or_not_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: not a file of the gallery: no such file"):
        gallery.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not a file of the gallery: content: Invalid JSON"):
        gallery.read(tmp_path / "bad.json")


def test_what_a_machine_did_not_measure_is_named_so():
    climb = machines.Climb("x", parse())
    assert climb.cell("tf32", "over_previous") == "2.00 [2.00,\N{NO-BREAK SPACE}2.00]"
    assert climb.cell("bf16", "over_previous") == climb.cell("fp32", "peak_memory_mib") == machines.NOT_MEASURED
    assert "| A machine |" in machines.level_part("tf32", [climb])
    assert "A machine" not in machines.level_part("bf16", [climb])
    assert "| fp32 | the baseline | 1,707 tokens/s | |" in " ".join(
        machines.readme_part([climb]).replace("`", "").split()
    )


def test_a_gain_over_another_level_than_the_one_before_is_not_shown():
    run = measurement(fp32=[300.0] * 6, flash=[150.0] * 6)  # without tf32, bf16 and compile
    climb = machines.Climb("x", parse(benchmark=run.model_dump()))
    assert climb.cell("flash", "over_baseline").startswith("2.00")
    assert climb.cell("flash", "over_previous") == machines.NOT_MEASURED


def test_a_level_without_effect_is_named_so_and_the_next_one_is_compared_with_the_level_above_it():
    run = measurement(fp32=[300.0] * 6, bf16=[150.0] * 6)
    skipped = {"tf32": {"note": "`precision: tf32` has no effect on this device: TF32 is a mode of NVIDIA GPUs"}}
    climb = machines.Climb("x", parse(benchmark=run.model_dump(), levels=skipped))
    assert climb.cell("tf32", "over_previous") == climb.cell("tf32", "step_ms") == "no effect"
    assert climb.cell("bf16", "over_previous").startswith("2.00")
    row = machines.level_part("bf16", [climb]).splitlines()[2]
    assert "over `fp32`" in row
    assert "300 → 150" in row
    assert machines.level_part("tf32", [climb]) == "Not measured yet on any machine."


def test_levels_that_were_measured_in_the_earlier_order_are_marked():
    times = {"fp32": [300.0] * 6, "fused": [200.0] * 6, "chunked": [250.0] * 6, "allocator": [125.0] * 6}
    earlier = machines.Climb("x", parse(benchmark=measurement(**times).model_dump()))
    rows = {row[0]: row[-1] for row in machines.ladder_table([earlier], {})}
    assert (rows["`chunked`"][:4], rows["`allocator`"][:4]) == ("0.80", "2.00")
    assert {name for name, cell in rows.items() if cell.endswith("†")} == {"`chunked`", "`allocator`"}
    assert "over `chunked` | 250 → 125 |" in machines.level_part("allocator", [earlier])
    for names in (("fp32", "fused", "allocator", "chunked"), ("fp32", "fused", "chunked")):
        now = measurement(**{name: times[name] for name in names})
        rows = machines.ladder_table([machines.Climb("x", parse(benchmark=now.model_dump()))], {})
        assert not [row for row in rows if row[-1].endswith("†")]


def test_the_readers_own_peak_does_not_change_other_machines(monkeypatch):
    expected = machines.Climb("x", parse()).cell("fp32", "mfu")
    mine = machines.PARAMS.model_copy(update={"peak_tflops": {"fp32": 82.6}})
    monkeypatch.setattr(machines, "PARAMS", mine)
    assert machines.Climb("x", parse()).cell("fp32", "mfu") == expected


@pytest.mark.parametrize("half", ["auto", "bf16"])
def test_a_t4s_16_bit_levels_have_a_share_of_its_float16_peak(monkeypatch, half):
    run = measurement(fp32=[300.0] * 6, bf16=[100.0] * 6)
    t4 = run.environment.model_copy(update={"device": "cuda", "device_name": "Tesla T4", "bf16": False})
    monkeypatch.setattr(machines, "PARAMS", machines.PARAMS.model_copy(update={"half": half}))  # the reader's
    gains = machines.Climb("t4", parse(benchmark={**run.model_dump(), "environment": t4.model_dump()})).gains["levels"]
    assert [gains[name]["peak_tflops"] for name in ("fp32", "bf16")] == [8.1, 65.0]


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
