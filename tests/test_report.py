"""What the reader sees is what was measured."""

import re
from html import unescape

import pytest
from conftest import REPOSITORY, environment, measurement

from gpt2_ladder import metrics, params_yaml, report, tables
from gpt2_ladder.config import UserError

PARAMS = params_yaml.load(REPOSITORY / "params.yaml")
LEVELS = dict(list(PARAMS.levels.items())[:9])  # the seed's; levels of one's own come after them
TRAINED = {
    "status": "trained",
    "reason": None,
    "note": None,
    "environment": environment().fingerprint,
    "devices": 1,
    "parameters": 124439808,
    "loss_first": 10.95,
    "loss_last": 6.72,
    "val_loss": 7.0,
    "bits_per_byte": 3.1,
    "epochs_seen": 0.02,
    "step_ms": 1300.4,
    "tokens_per_second": 98.6,
    "compile_seconds": None,
    "compile_cache": None,
    "peak_memory_mib": 2048.0,
    "micro_batch": 2,
    "attention_kernel": None,
    "float32_matmul_precision": "ieee",
}
SKIPPED = {**TRAINED, "status": "skipped", "reason": "no compiler"} | dict.fromkeys(metrics.MEASURED)
RUN = measurement(
    fp32=[300.0] * 4, tf32=[300.0, 301.0, 299.0, 300.0], bf16=[150.0] * 4, compile=[120.0, 100.0, 120.0, 121.0]
)


def gains() -> dict:
    levels = {}
    for previous, name in zip([None, *RUN.levels], RUN.levels, strict=False):
        levels[name] = {
            **{"step_ms": RUN.step_ms(name)[0], "tokens_per_second": 1000.0, "tflops": 0.2, "peak_tflops": 0.4},
            "mfu": 0.5 if name != "tf32" else None,
            "over_previous": RUN.compare(name, previous, RUN.noise()) if previous else None,
            "over_baseline": RUN.compare(name, "fp32", RUN.noise()) if previous else None,
        }
    return {
        "environment": environment().fingerprint,
        "estimator": RUN.estimator,
        "rounds": 4,
        "peak_source": "a bare matrix product in the same round",
        "control": {"ratio": 1.0, "low": 0.99, "high": 1.01},
        "levels": levels,
    }


def profiled(self_ms: dict[str, float]) -> list[dict]:
    """What the profile has of the operators that took so long."""
    return [{"name": name, "calls": 3, "self_ms": ms} for name, ms in self_ms.items()]


OPERATORS = {
    "fp32": profiled({"aten::mm": 200.0, "aten::add": 50.0}),
    "tf32": profiled({"aten::mm": 208.0, "aten::add": 52.0}),
    "bf16": profiled({"aten::mm": 80.0, "aten::copy_": 20.0}),
    "compile": profiled({"fused by torch.compile": 60.0}),
}


def facts(
    results: dict | None = None,
    weights: str = "openai",
    note: str | None = None,
    operators: dict = OPERATORS,
    measured: dict | None = None,
) -> dict:
    difference = {"max_abs_logit_diff": 2e-6, "max_abs_logit": 3.2}
    return report.facts(
        model="gpt2",
        levels=LEVELS,
        results=results or dict.fromkeys(LEVELS, TRAINED),
        gains=measured or gains(),
        parity={
            "baseline": "fp32",
            "micro_batch": 2,
            "environment": environment().fingerprint,
            "levels": {name: {"largest": 0.0012, "steps": 10} for name in RUN.levels},
        },
        operators=operators,
        trial=TRAINED,
        verify={"weights": weights, "note": note, **difference, "random": difference},
        overfit={"steps": 50, "loss_first": 10.98, "loss_last": 0.003},
        environment=environment(),
        shapes={"quality": PARAMS.quality, "speed": PARAMS.machines["cpu"]},
    )


def test_every_level_names_the_one_switch_that_changes():
    rows = tables.training_table(LEVELS, dict.fromkeys(LEVELS, TRAINED), TRAINED)
    assert [row[1] for row in rows[1:-1]] == [
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
    assert rows[1][2:] == ["124,439,808", "10.9500", "6.7200", "7.0000", "3.1000", "99"]


def test_the_speed_table_has_gains_with_intervals_and_marks_what_may_be_noise():
    table = {row[0]: dict(zip(tables.SPEED_TITLES, row, strict=True)) for row in facts()["speed"]}
    assert table["fp32"]["over the level before"] == tables.MISSING
    assert table["tf32"]["over the level before"] == "no measurable gain [1.00, 1.00]"
    assert table["bf16"]["over the level before"] == "2.00 [1.99, 2.01]"
    assert table["compile"]["over the baseline"].startswith("2.5")
    assert [table[name]["TFLOP/s (of the peak)"] for name in ("fp32", "tf32")] == ["0.2 (50%)", "0.2"]
    assert table["bf16"]["loss apart by"] == "0.0012"
    assert set(list(table["flash"].values())[2:]) == {tables.MISSING}  # it was not measured


def test_a_gain_that_may_be_noise_says_how_many_rounds_would_tell():
    (line,) = facts()["undecided"]
    assert re.fullmatch(
        r"`tf32` over `fp32`: no measurable gain in 4 rounds; if it is 1\.000, over 10,000 rounds would show it", line
    )


def test_why_a_level_is_faster_is_drawn_from_its_operators():
    lines = facts()["reasons"]
    # nothing of tf32, which is not measurably faster; the profiled 260 and 100 ms are scaled to the median step
    assert lines == [
        "`bf16`: 300 -> 150 ms a step; aten::mm 240 -> 120 ms, aten::add 60 -> 0 ms, aten::copy_ 0 -> 30 ms",
        "`compile`: 150 -> 120 ms a step; aten::mm 120 -> 0 ms, fused by torch.compile 0 -> 120 ms, "
        "aten::copy_ 30 -> 0 ms",
    ]


def test_the_waterfall_starts_where_the_level_before_ended():
    steps = report.ladder_steps(gains())
    assert [step["level"] for step in steps] == RUN.levels
    assert [step["start"] for step in steps] == [0, *(step["end"] for step in steps[:-1])]
    assert steps[2]["end"] == pytest.approx(2000)  # the baseline's 1000 tokens/s, twice as fast
    assert steps[2]["low"] <= steps[2]["end"] <= steps[2]["high"]
    assert [step["verdict"] for step in steps[:3]] == ["baseline", "no measurable gain", "faster"]


@pytest.mark.parametrize("page", [report.markdown, lambda found: report.html(found, {"ladder": "<svg/>"})])
def test_both_pages_say_the_same(page):
    text = unescape(page(facts()))
    parts = "2.00 [1.99, 2.01]", "A processor", "4 rounds", "124,439,808", "make repro", "2.0e-06", "240 -> 120 ms"
    for part in parts:
        assert part in text


def test_the_html_page_needs_nothing_but_itself():
    text = report.html(facts(), {"ladder": "<svg><text>1.2</text></svg>"})
    assert "<svg><text>1.2</text></svg>" in text
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script", text)


def test_a_device_name_cannot_break_the_page():
    found = facts() | {"environment": environment(device_name="<b>GPU</b>")}
    assert "&lt;b&gt;GPU&lt;/b&gt;" in report.html(found, {"ladder": ""})


def test_a_skipped_level_has_its_reason_and_no_numbers():
    results = {name: SKIPPED if name == "flash" else TRAINED for name in LEVELS}
    found = facts(results)
    row = next(row for row in found["training"] if row[0] == "flash")
    assert set(row[2:]) == {tables.MISSING}
    assert "- `flash`: no compiler" in report.markdown(found)
    assert "<code>flash</code>: no compiler" in report.html(found, {"ladder": ""})


def test_results_of_two_machines_do_not_get_into_one_report():
    elsewhere = {"environment": environment(threads=4).fingerprint}
    told = r"are from environment .* \(A processor, torch 2\): they do not belong .* `dvc repro` makes again"
    with pytest.raises(UserError, match=f"the results of bf16 {told}"):
        facts({**dict.fromkeys(LEVELS, TRAINED), "bf16": TRAINED | elsewhere})
    with pytest.raises(UserError, match=f"the results of benchmark {told}"):
        facts(measured=gains() | elsewhere)


def test_a_headline_promises_no_gain_that_was_not_measured():
    found = facts()
    assert "3.00 [" not in found["gain"]
    assert found["fastest"] == "compile"
    assert "times as fast" in report.html(found, {"ladder": ""})
    noise = found | {"measurable": False}
    for text in (report.markdown(noise), report.html(noise, {"ladder": ""})):
        assert "no level is measurably faster" in text
        assert "times as fast" not in text


def test_the_ten_costliest_operators_are_shown():
    many = profiled({f"aten::op{index}": 20.0 - index for index in range(12)})
    text = report.html(facts(operators={"bf16": many}), {"ladder": ""})
    assert "aten::op9" in text
    assert "aten::op10" not in text


def test_the_page_says_plainly_that_a_stand_in_was_used():
    note = "OpenAI's weights were NOT verified: dvc repro -f download"
    assert f"- {note}" in report.markdown(facts(weights="stand-in", note=note))
    assert "random stand-in weights" in report.html(facts(weights="stand-in", note=note), {"ladder": ""})
    assert "NOT verified" not in report.markdown(facts())


def test_tables_are_aligned():
    lines = tables.markdown_table(facts()["speed"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + 6


def test_two_machines_stand_side_by_side_and_no_number_mixes_them():
    here, there = RUN, measurement(fp32=[30.0] * 4, bf16=[10.0] * 4, padded=[9.0] * 4)
    table = tables.side_by_side(here, there)
    assert table[1:] == [
        ["fp32", "300", tables.MISSING, "30", tables.MISSING],
        ["tf32", "300", "no measurable gain [1.00, 1.00]", tables.MISSING, tables.MISSING],
        ["bf16", "150", "2.00 [1.99, 2.01]", "10", "3.00 [3.00, 3.00]"],
        ["compile", "120", "1.25 [1.24, 1.50]", tables.MISSING, tables.MISSING],
        ["padded", tables.MISSING, tables.MISSING, "9", "1.11 [1.11, 1.11]"],
    ]


def test_a_micro_batch_is_said_and_more_so_where_levels_differ():
    assert report.micro_batch_notes({"fp32": {"micro_batch": 2}, "bf16": {"micro_batch": 2}}, 2) == []
    (note,) = report.micro_batch_notes({"fp32": {"micro_batch": 4}, "bf16": {"micro_batch": 4}}, 16)
    assert note == "memory holds 4 of a batch's 16 rows at a time: gradients were accumulated"
    _, other = report.micro_batch_notes({"fp32": {"micro_batch": 8}, "bf16": {"micro_batch": 4}}, 16)
    assert other.startswith("`fp32` was trained with 8 rows at a time where others had 4")


def test_trainings_on_several_devices_say_what_is_of_all_and_what_of_one():
    trainings = {name: {**TRAINED, "devices": 8} for name in ("fp32", "tf32", "bf16", "compile", "trial")}
    (note,) = report.device_notes(trainings, gains(), "A processor")  # whose ranks may share it: no peak times eight
    assert "the trial were trained on 8 devices: their tokens/s in passing are of all of them" in note
    trainings["fp32"] = {**trainings["fp32"], "tokens_per_second": 6000.0}
    notes = report.device_notes(trainings, gains(), "NVIDIA L4")
    # one device does 1,000 tokens/s at half its peak; eight do 6,000, so each three quarters of that
    assert "`fp32` trained at 38% of the peak of all 8 devices" in notes
    assert not any("tf32" in note for note in notes)  # its peak is not known
    assert report.device_notes({**trainings, "trial": TRAINED}, gains(), "NVIDIA L4") == []


def test_trainings_on_different_numbers_of_devices_do_not_come_into_one_table():
    results = dict.fromkeys(LEVELS, TRAINED)
    with pytest.raises(UserError, match="different numbers of devices"):
        facts({**results, "bf16": {**TRAINED, "devices": 8}})
    facts({**results, "untied": {**TRAINED, "devices": 8}})  # a quality level's speed is compared with nobody's
