"""A file for the gallery, written from a climb."""

import getpass
from pathlib import Path

import pytest

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.reporting import gallery
from helpers.climbing import call
from helpers.common import measurement
from pipeline.tools import contribute


@pytest.mark.slow
def test_a_committed_climb_becomes_a_file_of_the_gallery(clone, monkeypatch):
    monkeypatch.chdir(clone)
    contribute.main("rtx-4090", "--title", "RTX 4090")
    machine = gallery.read(gallery.FOLDER / "rtx-4090.json")
    assert machine.title == "RTX 4090"
    code = call(clone, "git", "log", "-1", "--format=%H", "--", "src", "pipeline/train.py").strip()
    assert machine.commit == code != call(clone, "git", "rev-parse", "HEAD").strip()
    assert str(machine.date) == call(clone, "git", "log", "-1", "--format=%cs").strip()
    bf16 = machine.levels["bf16"]
    assert len(bf16.losses) == 4  # the steps of the tests' climb, which makes no profile
    assert bf16.loss_difference > 0
    assert bf16.peak_memory_mib > 100
    (clone / "results/benchmark.json").write_text("{}")
    with pytest.raises(UserError, match="results: not committed; commit the results first"):
        contribute.main("rtx-4090")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results outside of Git, without a profile and without most numbers."""
    monkeypatch.chdir(tmp_path)
    files.write_json(tmp_path / "results/benchmark.json", measurement(fp32=[300.0] * 6).model_dump())
    files.write_json(tmp_path / "results/parity.json", {"levels": {"fp32": {"largest": 0.25}}})
    metrics = {"reason": None, "note": "a note", "parameters": 3, "step_ms": 1.0}
    files.write_json(tmp_path / "results/levels/fp32/metrics.json", metrics)
    files.write(tmp_path / "results/levels/fp32/steps.csv", "step,loss\n0,9.5\n1,9.25\n")
    return "--commit", "17f2d6b", "--date", "2026-11-26"


def test_results_of_older_code_are_read_and_what_they_lack_is_empty(results):
    contribute.main("old", *results, "--note", "Two cores.")
    machine = gallery.read(gallery.FOLDER / "old.json")
    (level,) = machine.levels.values()
    assert (level.losses, level.note, level.loss_difference, level.operators) == ((9.5, 9.25), "a note", 0.25, ())
    assert (machine.title, machine.notes) == ("A processor", ("Two cores.",))
    levels = {"bf16": {"largest": 0.25, "switches": {"precision": "fp16"}}}
    files.write_json(Path("results/parity.json"), {"levels": levels})
    contribute.main("t4", *results)
    assert gallery.read(gallery.FOLDER / "t4.json").notes == ("Here, bf16 stands for fp16.",)


def test_a_wrong_name_an_uncommitted_folder_and_a_private_word_are_refused(results, monkeypatch):
    for arguments, message in [
        (("My GPU", *results), "My GPU: name the machine with a-z, 0-9 and single hyphens"),
        (("x",), "results: not committed"),
        (("x", *results, "--note", "by somebody"), "'somebody' is the name of this user or machine"),
    ]:
        monkeypatch.setattr(getpass, "getuser", lambda: "somebody")
        with pytest.raises(UserError, match=message):
            contribute.main(*arguments)
    assert not gallery.FOLDER.exists()


def test_a_level_without_steps_csv_has_no_losses_and_its_note_no_path(results):
    files.write_json(Path("results/levels/tf32/metrics.json"), {"reason": None, "note": "in /opt/x: failed"})
    contribute.main("old", *results)
    levels = gallery.read(gallery.FOLDER / "old.json").levels
    assert {name: level.losses for name, level in levels.items()} == {"fp32": (9.5, 9.25), "tf32": ()}
    assert levels["tf32"].note == "in PATH failed"  # a compiler's message may contain a path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("levels/fp32/steps.csv", "step,loss\n0,nan\n"),
        ("levels/fp32/steps.csv", "step,loss\n0,\n"),
        ("levels/fp32/steps.csv", "step\n0\n"),
        ("levels/fp32/metrics.json", "{"),
        ("levels/fp32/metrics.json", "[]"),
        ("levels/fp32/metrics.json", "{}"),
        ("levels/fp32/metrics.json", '{"reason": null, "note": 3}'),
        ("parity.json", "{}"),
        ("parity.json", '{"levels": {"fp32": {}}}'),
        ("profile.json", '{"fp32": null}'),
        ("profile.json", '{"fp32": [{"name": "mm"}]}'),
        ("benchmark.json", "{}"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(results, name, content):
    Path("results", name).write_text(content)
    with pytest.raises(UserError, match=r"^results: not the results of a climb \(.{1,200}\)$"):
        contribute.main("x", *results)
    assert not gallery.FOLDER.exists()


def test_small_operators_are_summed():
    rows = [
        {"name": name, "calls": 2, "self_ms": ms} for name, ms in (("mm", 990.0), ("add", 6.0), ("a", 3.0), ("b", 1.0))
    ]
    assert [(row.name, row.calls, row.self_ms) for row in contribute.costliest(rows)] == [
        ("mm", 2, 990.0),
        ("add", 2, 6.0),
        (gallery.OTHERS, 4, 4.0),
    ]
