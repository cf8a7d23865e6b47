"""What the reader sees is what was measured."""

import re
from html import unescape

import pytest

from gpt2_ladder.config import UserError
from gpt2_ladder.reporting import facts, tables
from helpers.common import environment, measurement
from helpers.results import LEVELS, RUN, SKIPPED, TRAINED, content, gains, profiled


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
    table = {row[0]: dict(zip(tables.SPEED_TITLES, row, strict=True)) for row in content()["speed"]}
    assert table["fp32"]["over the level before"] == tables.MISSING
    assert table["tf32"]["over the level before"] == "no measurable gain [1.00, 1.00]"
    assert table["bf16"]["over the level before"] == "2.00 [1.99, 2.01]"
    assert table["compile"]["over the baseline"].startswith("2.5")
    assert [table[name]["TFLOP/s (of the peak)"] for name in ("fp32", "tf32")] == ["0.2 (50%)", "0.2"]
    assert table["bf16"]["loss apart by"] == "0.0012"
    assert set(list(table["flash"].values())[2:]) == {tables.MISSING}  # it was not measured


def test_a_gain_that_may_be_noise_says_how_many_rounds_would_tell():
    (line,) = content()["undecided"]
    assert re.fullmatch(
        r"`tf32` over `fp32`: no measurable gain in 4 rounds; if it is 1\.000, over 10,000 rounds would show it", line
    )


def test_why_a_level_is_faster_is_drawn_from_its_operators():
    lines = content()["reasons"]
    # nothing of tf32, which is not measurably faster; the profiled 260 and 100 ms are scaled to the median step
    assert lines == [
        "`bf16`: 300 -> 150 ms a step; aten::mm 240 -> 120 ms, aten::add 60 -> 0 ms, aten::copy_ 0 -> 30 ms",
        "`compile`: 150 -> 120 ms a step; aten::mm 120 -> 0 ms, fused by torch.compile 0 -> 120 ms, "
        "aten::copy_ 30 -> 0 ms",
    ]


def test_the_waterfall_starts_where_the_level_before_ended():
    steps = facts.ladder_steps(gains())
    assert [step["level"] for step in steps] == RUN.levels
    assert [step["start"] for step in steps] == [0, *(step["end"] for step in steps[:-1])]
    assert steps[2]["end"] == pytest.approx(2000)  # the baseline's 1000 tokens/s, twice as fast
    assert steps[2]["low"] <= steps[2]["end"] <= steps[2]["high"]
    assert [step["verdict"] for step in steps[:3]] == ["baseline", "no measurable gain", "faster"]


@pytest.mark.parametrize("page", [facts.markdown, lambda found: facts.html(found, {"ladder": "<svg/>"})])
def test_both_pages_say_the_same(page):
    text = unescape(page(content()))
    parts = "2.00 [1.99, 2.01]", "A processor", "4 rounds", "124,439,808", "make repro", "2.0e-06", "240 -> 120 ms"
    for part in parts:
        assert part in text


def test_the_html_page_needs_nothing_but_itself():
    text = facts.html(content(), {"ladder": "<svg><text>1.2</text></svg>"})
    assert "<svg><text>1.2</text></svg>" in text
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script", text)


def test_a_device_name_cannot_break_the_page():
    found = content() | {"environment": environment(device_name="<b>GPU</b>")}
    assert "&lt;b&gt;GPU&lt;/b&gt;" in facts.html(found, {"ladder": ""})


def test_a_skipped_level_has_its_reason_and_no_numbers():
    results = {name: SKIPPED if name == "flash" else TRAINED for name in LEVELS}
    found = content(results)
    row = next(row for row in found["training"] if row[0] == "flash")
    assert set(row[2:]) == {tables.MISSING}
    assert "- `flash`: no compiler" in facts.markdown(found)
    assert "<code>flash</code>: no compiler" in facts.html(found, {"ladder": ""})


def test_results_of_two_machines_do_not_get_into_one_report():
    elsewhere = {"environment": environment(threads=4).fingerprint}
    told = r"are from environment .* \(A processor, torch 2\): they do not belong .* `dvc repro` makes again"
    with pytest.raises(UserError, match=f"the results of bf16 {told}"):
        content({**dict.fromkeys(LEVELS, TRAINED), "bf16": TRAINED | elsewhere})
    with pytest.raises(UserError, match=f"the results of benchmark {told}"):
        content(measured=gains() | elsewhere)


def test_a_headline_promises_no_gain_that_was_not_measured():
    found = content()
    assert "3.00 [" not in found["gain"]
    assert found["fastest"] == "compile"
    assert "times as fast" in facts.html(found, {"ladder": ""})
    noise = found | {"measurable": False}
    for text in (facts.markdown(noise), facts.html(noise, {"ladder": ""})):
        assert "no level is measurably faster" in text
        assert "times as fast" not in text


def test_the_ten_costliest_operators_are_shown():
    many = profiled({f"aten::op{index}": 20.0 - index for index in range(12)})
    text = facts.html(content(operators={"bf16": many}), {"ladder": ""})
    assert "aten::op9" in text
    assert "aten::op10" not in text


def test_the_page_says_plainly_that_a_stand_in_was_used():
    note = "OpenAI's weights were NOT verified: dvc repro -f download"
    assert f"- {note}" in facts.markdown(content(weights="stand-in", note=note))
    assert "random stand-in weights" in facts.html(content(weights="stand-in", note=note), {"ladder": ""})
    assert "NOT verified" not in facts.markdown(content())


def test_tables_are_aligned():
    lines = tables.markdown_table(content()["speed"]).splitlines()
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
    assert facts.micro_batch_notes({"fp32": {"micro_batch": 2}, "bf16": {"micro_batch": 2}}, 2) == []
    (note,) = facts.micro_batch_notes({"fp32": {"micro_batch": 4}, "bf16": {"micro_batch": 4}}, 16)
    assert note == "memory holds 4 of a batch's 16 rows at a time: gradients were accumulated"
    _, other = facts.micro_batch_notes({"fp32": {"micro_batch": 8}, "bf16": {"micro_batch": 4}}, 16)
    assert other.startswith("`fp32` was trained with 8 rows at a time where others had 4")


def test_trainings_on_several_devices_say_what_is_of_all_and_what_of_one():
    trainings = {name: {**TRAINED, "devices": 8} for name in ("fp32", "tf32", "bf16", "compile", "trial")}
    (note,) = facts.device_notes(trainings, gains(), "A processor")  # whose ranks may share it: no peak times eight
    assert "the trial were trained on 8 devices: their tokens/s in passing are of all of them" in note
    trainings["fp32"] = {**trainings["fp32"], "tokens_per_second": 6000.0}
    notes = facts.device_notes(trainings, gains(), "NVIDIA L4")
    # one device does 1,000 tokens/s at half its peak; eight do 6,000, so each three quarters of that
    assert "`fp32` trained at 38% of the peak of all 8 devices" in notes
    assert not any("tf32" in note for note in notes)  # its peak is not known
    assert facts.device_notes({**trainings, "trial": TRAINED}, gains(), "NVIDIA L4") == []


def test_trainings_on_different_numbers_of_devices_do_not_come_into_one_table():
    results = dict.fromkeys(LEVELS, TRAINED)
    with pytest.raises(UserError, match="different numbers of devices"):
        content({**results, "bf16": {**TRAINED, "devices": 8}})
    content({**results, "untied": {**TRAINED, "devices": 8}})  # a quality level's speed is compared with nobody's
