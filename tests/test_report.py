"""What the reader sees is what was measured."""

import pytest
from conftest import REPOSITORY

from gpt2_ladder import config, metrics, report

PARAMS = config.load(REPOSITORY / "params.yaml")
LEVELS = dict(list(PARAMS.levels.items())[:9])  # the seed's; levels of one's own come after them
TRAINED = {
    "status": "trained",
    "reason": None,
    "note": None,
    "parameters": 124439808,
    "loss_first": 10.95,
    "loss_last": 6.72,
    "val_loss": 7.0,
    "epochs_seen": 0.02,
    "step_ms": 1300.4,
    "tokens_per_second": 98.6,
    "compile_seconds": None,
    "compile_cache": None,
    "peak_memory_mib": 2048.0,
    "float32_matmul_precision": "ieee",
}
SKIPPED = {"status": "skipped", "reason": "no compiler", "note": None} | dict.fromkeys(metrics.MEASURED)


def test_every_level_names_the_one_switch_that_changes():
    rows = report.ladder_rows(LEVELS, dict.fromkeys(LEVELS, TRAINED))
    assert [row[1] for row in rows] == [
        "start: PyTorch's defaults",
        "tie_weights: true",
        "init: gpt2",
        "the speed shape only",
        "precision: tf32",
        "precision: bf16",
        "compile: true",
        "attention: flash",
        "vocab_size: 50304",
    ]
    assert rows[0][2:] == ["124,439,808", "10.9500", "6.7200", "7.0000", "1,300", "99", report.MISSING, "2,048"]


def test_a_skipped_level_has_its_reason_and_no_numbers():
    results = {name: SKIPPED if name == "compile" else TRAINED for name in LEVELS}
    row = report.ladder_rows(LEVELS, results)[6]
    assert row[0] == "compile"
    assert set(row[2:]) == {report.MISSING}
    assert "- `compile`: no compiler" in page(results)


def test_the_table_is_aligned():
    lines = report.markdown_table(report.ladder_rows(LEVELS, dict.fromkeys(LEVELS, TRAINED))).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(LEVELS)


def test_the_page_says_plainly_that_a_stand_in_was_used():
    note = "OpenAI's weights were NOT verified: dvc repro -f download"
    assert f"- {note}" in page(dict.fromkeys(LEVELS, TRAINED), weights="stand-in", note=note)
    assert "NOT verified" not in page(dict.fromkeys(LEVELS, TRAINED))


@pytest.mark.parametrize("name", ["loss.png", "speed.png"])
def test_pictures_are_drawn_without_a_network(tmp_path, name):
    path = tmp_path / name
    if name == "loss.png":
        rows = [{"level": level, "group": "speed", "step": step, "loss": 9.0} for level in "ab" for step in range(3)]
        report.save_loss_chart(rows, path)
    else:
        report.save_speed_chart({"fp32": 100.0, "bf16": 160.0}, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def page(results: dict, weights: str = "openai", note: str | None = None) -> str:
    difference = {"max_abs_logit_diff": 2e-6, "max_abs_logit": 3.2}
    environment = {"device": "cpu", "device_name": "x", "bf16": True, "compile_problem": None, "threads": 2}
    return report.ladder_markdown(
        levels=LEVELS,
        results=results,
        trial=TRAINED,
        verify={"weights": weights, "note": note, **difference, "random": difference},
        overfit={"steps": 50, "loss_first": 10.98, "loss_last": 0.003},
        environment=config.Environment(**environment, python="3", torch="2", platform="Linux"),
        shapes={"quality": PARAMS.quality, "speed": PARAMS.machines["cpu"]},
    )
