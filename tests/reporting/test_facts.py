"""The report shows what was measured."""

import re
from html import unescape

import pytest

from gpt2_ladder.config import UserError
from gpt2_ladder.ledger import PHASES
from gpt2_ladder.reporting import facts, tables
from helpers.common import environment, measurement
from helpers.results import LEVELS, PARITY, RUN, SKIPPED, TRAINED, TRIAL, content, gains, profiled

SVG = "<svg><text>1.2</text></svg>"
EVEN = measurement(fp32=[300.0] * 4, tf32=[300.0] * 4, bf16=[330.0] * 4)  # no level is faster


def html(report: dict) -> str:
    return facts.templates.get_template("ladder.html").render(report, pictures={"ladder": SVG, "speed": SVG})


def markdown(report: dict) -> str:
    return facts.templates.get_template("ladder.md").render(report, pictures=("ladder", "speed"))


def summary(report: dict) -> str:
    return facts.templates.get_template("summary.txt").render(report)


def test_every_row_names_the_switch_that_changes():
    rows = tables.training_table(LEVELS, dict.fromkeys(LEVELS, TRAINED), TRAINED)
    switches = "tie_weights: true, init: gpt2, the speed shape only, precision: tf32, precision: bf16, compile: true"
    assert ", ".join(row[1] for row in rows[2:8]) == switches
    assert rows[1][2:] == ["124,439,808", "10.9500", "6.7200", "7.0000", "3.1000", "99", "91"]


def test_the_speed_table_shows_gains_with_intervals_and_marks_noise():
    titles, *rows = content()["speed"]
    table = {row[0]: dict(zip(titles, row, strict=True)) for row in rows}
    assert table["fp32"]["over the previous level"] == tables.MISSING
    assert table["tf32"]["over the previous level"] == "no measurable gain [1.00, 1.00]"
    assert table["bf16"]["over the previous level"] == "2.00 [1.99, 2.01]"
    assert table["compile"]["over the baseline"].startswith("2.5")
    assert [table[name]["TFLOP/s (of the peak)"] for name in ("fp32", "tf32")] == ["0.2 (50%)", "0.2"]
    assert table["bf16"]["loss difference"] == "0.0012"
    assert set(list(table["flash"].values())[2:]) == {tables.MISSING}  # it was not measured


def test_the_share_of_a_gpus_own_product_has_a_column_and_a_note():
    measured = gains()
    for level in measured["levels"].values():
        level |= {"mfu": 0.37, "mfu_of_product": 0.47}
    report = content(gains=measured | {"product_size": 8192})
    titles, first, *_ = report["speed"]
    row = dict(zip(titles, first, strict=True))
    assert (row["TFLOP/s (of the peak)"], row["of its own product"]) == ("0.2 (37%)", "47%")
    note = "share of what a bare 8192 x 8192 matrix product reached in the same round"
    assert note in markdown(report)
    assert note in html(report)


def test_a_cpu_has_no_second_column_because_its_peak_is_its_own_product():
    measured = gains()
    for level in measured["levels"].values():
        level |= {"mfu": 0.5, "mfu_of_product": 0.5}
    assert content(gains=measured)["speed"][0] == content()["speed"][0]
    assert "of its own product" not in content()["speed"][0]


def test_a_gain_within_the_noise_shows_how_many_rounds_are_needed():
    (line,) = content()["undecided"]
    expected = "no measurable gain in 4 rounds; over 10,000 rounds are needed to measure a gain of 1.000"
    assert line == f"`tf32` over `fp32`: {expected}"


def test_the_reason_for_a_gain_is_the_operators_that_changed():
    # no line for tf32, which is not measurably faster; the profiled 100 ms of bf16 are scaled to the median step
    assert content()["reasons"] == [
        "`bf16`: 300 -> 150 ms a step; aten::mm 240 -> 120 ms, aten::add 60 -> 0 ms, aten::copy_ 0 -> 30 ms",
        "`compile`: 150 -> 120 ms a step; aten::mm 120 -> 0 ms, fused by torch.compile 0 -> 120 ms, "
        "aten::copy_ 30 -> 0 ms",
    ]


def test_each_step_of_the_waterfall_starts_at_the_end_of_the_previous_one():
    steps = facts.ladder_steps(gains())
    assert [step["level"] for step in steps] == RUN.levels
    assert [step["start"] for step in steps] == [0, *(step["end"] for step in steps[:-1])]
    assert steps[2]["end"] == pytest.approx(2000)  # twice the baseline's 1000 tokens/s
    assert steps[2]["low"] <= steps[2]["end"] <= steps[2]["high"]
    assert [step["verdict"] for step in steps[:3]] == ["baseline", "no measurable gain", "faster"]


@pytest.mark.parametrize("page", [markdown, html])
def test_both_pages_show_the_same_facts(page):
    text = unescape(page(content()))
    for part in "2.00 [1.99, 2.01]", "A processor", "4 rounds", "124,439,808", "make repro", "2.0e-06", "240 -> 120 ms":
        assert part in text


def test_the_html_page_loads_nothing():
    text = html(content())
    assert "<svg><text>1.2</text></svg>" in text
    assert not re.search(r"src\s*=|url\(|@import|<(script|link)", text)
    assert not re.search(r"href\s*=", text.replace("<a href=", ""))


@pytest.mark.parametrize("page", [markdown, html])
def test_both_pages_link_a_level_to_its_page_if_it_has_one(page):
    links = re.findall(r"docs/levels/(\w+)\.md", page(content()).replace("README", ""))
    assert links == ["bf16", "bf16"]  # in the table of gains and in that of losses


@pytest.mark.parametrize("page", [markdown, html])
def test_only_existing_pictures_are_shown(page):
    text = page(content())
    assert text.count("speed.png") + text.count(SVG) == (1 if page is markdown else 2)
    assert "quality.png" not in text
    assert "picture of the differences" not in text
    assert "coincide by design" in text


def test_a_device_name_is_escaped_in_html():
    report = content() | {"environment": environment(device_name="<b>GPU</b>")}
    assert "&lt;b&gt;GPU&lt;/b&gt;" in html(report)


def test_a_skipped_level_has_its_reason_and_no_numbers():
    report = content(results={name: SKIPPED if name == "flash" else TRAINED for name in LEVELS})
    row = next(row for row in report["training"] if row[0] == "flash")
    assert set(row[2:]) == {tables.MISSING}
    assert "- `flash`: no compiler" in markdown(report)
    assert "<code>flash</code>: no compiler" in html(report)


def test_results_of_two_machines_are_refused():
    other = {"environment": environment(threads=4).fingerprint}
    message = r"are from environment .* \(A processor, torch 2\): run `dvc repro` to measure them again"
    with pytest.raises(UserError, match=f"the results of bf16 {message}"):
        content(results={**dict.fromkeys(LEVELS, TRAINED), "bf16": TRAINED | other})
    with pytest.raises(UserError, match=f"the results of benchmark {message}"):
        content(gains=gains() | other)


@pytest.mark.parametrize("page", [markdown, html])
def test_the_headline_has_the_fastest_level_and_the_largest_loss_difference(page):
    text = re.sub(r"</?code>", "`", page(content()))
    gain = content()["gains"]["levels"]["compile"]["over_baseline"]
    assert f"`compile` is the fastest level: it is {tables.gain_cell(gain)} times as fast as `fp32`" in text
    assert "agree with those of `fp32` within 0.0012 nats" in text


@pytest.mark.parametrize("page", [markdown, html])
def test_the_headline_promises_only_a_measured_gain(page):
    text = page(content(gains=gains(EVEN)))
    assert "No level is measurably faster" in text
    assert "fastest level" not in text


def test_a_machine_with_fast_bf16_is_named_with_its_peaks():
    measured = gains()
    measured["levels"]["bf16"]["peak_tflops"] = 1.2
    text = markdown(content(gains=measured))
    bf16 = "`bf16` is 2.00 [2.00, 2.00] times as fast as `fp32`"
    assert f"{bf16}, and the peak in bf16 is 3.0 times the peak in fp32." in text
    measured["levels"]["fp32"]["peak_tflops"] = None  # as on a GPU that is not listed
    assert f"{bf16}.\n" in markdown(content(gains=measured))
    assert "On an H100" not in text


def test_a_ladder_in_float16_says_so():
    levels = {
        name: row.model_copy(update={"precision": "fp16"} if row.precision == "bf16" else {})
        for name, row in LEVELS.items()
    }
    report = markdown(content(levels=levels))
    assert "fp16 is fast here: `bf16` is 2.00" in report
    assert "| precision: fp16 " in report
    assert "bf16 is fast" not in report


@pytest.mark.parametrize("page", [markdown, html])
def test_a_machine_without_fast_bf16_shows_the_gains_of_an_h100(page):
    def answer(run, bf16: bool = True) -> str:
        return re.sub(r"</?code>", "`", page(content(gains=gains(run)) | {"environment": environment(bf16=bf16)}))

    on_h100 = "On an H100, `bf16` gains 2.00, `compile` gains 1.25, and `compile` is 2.5"
    slow = answer(EVEN)
    assert "no fast bf16: `bf16` is 0.91 [0.91, 0.91] times as fast as `fp32`" in slow
    skipped = answer(measurement(fp32=[300.0] * 4, tf32=[300.0] * 4), bf16=False)
    assert "no fast bf16: `bf16` was skipped." in skipped
    for text in (slow, skipped):
        assert "On an H100" in text
        assert on_h100 in " ".join(text.split())
    slightly = measurement(fp32=[300.0] * 4, tf32=[300.0] * 4, bf16=[270.0] * 4)  # 1.11 times as fast
    assert "bf16 gains little here: `bf16` is 1.11" in answer(slightly)
    assert on_h100 in " ".join(answer(slightly).split())
    unmeasured = answer(measurement(fp32=[300.0] * 4, tf32=[300.0] * 4))
    assert "no fast bf16: `bf16` was not measured." in unmeasured


@pytest.mark.parametrize("page", [markdown, html])
def test_the_headline_has_the_gain_of_a_changed_trial(page):
    def answers(**changes: object) -> str:
        return re.sub(r"</?code>", "`", page(content(trial={**TRIAL, **changes})))

    answer = "`precision=bf16`: 2.00 [1.99, 2.01] times as fast as `fp32`, losses within 0.0006 nats."
    assert answer in answers()
    assert "Your trial" not in answers(changes={})


NOISY = measurement(fp32=[300.0, 310.0, 290.0, 305.0, 295.0, 300.0], trial=[295.0, 300.0, 296.0, 299.0, 301.0, 297.0])
NO_GAIN = {**NOISY.compare("trial", "fp32", NOISY.noise()), "count_to_settle": 30}
OTHER = {"loss_apart": None, "not_compared": "other losses are expected with init"}
NOT_MEASURED = {"gain": None, "measurement": None}


@pytest.mark.parametrize(
    ("changes", "result", "next_try"),
    [
        (
            {},
            "precision=bf16: 2.00 [1.99, 2.01] times as fast as fp32, losses within 0.0006 nats",
            'make try CHANGE="compile=true" adds this switch; docs/dvc.md shows how to undo changes',
        ),
        ({"changes": {}}, "compile is the fastest level: it is 2.5", 'make try CHANGE="precision=bf16"'),
        (
            {"changes": {"precision": "bf16", "compile": "true"}},
            "precision=bf16 compile=true: 2.00 ",
            "make show compares your experiments; docs/dvc.md shows how to undo changes",
        ),
        (
            {"gain": NO_GAIN},
            "precision=bf16: no measurable gain [0.98, 1.03] over fp32, losses within 0.0006",
            'make try CHANGE="trial.cpu.seconds=360" for about 30 rounds instead of 6',
        ),
        (
            {"gain": None, "not_measured": "only 3", "measurement": {"rounds": [0] * 3}},
            "precision=bf16: speed not measured (only 3), losses within 0.0006",
            'make try CHANGE="trial.cpu.seconds=144" for about 6 rounds instead of 3',
        ),
        (
            {"changes": {"init": "pytorch"}, **OTHER},
            "init=pytorch: 2.00 [1.99, 2.01] times as fast as fp32, last loss 6.7200 (other losses are expected with",
            'make try CHANGE="precision=bf16"',
        ),
        (
            {**SKIPPED, **OTHER, **NOT_MEASURED, "not_measured": "no compiler"},
            "precision=bf16: not trained (no compiler)\n",
            'make try CHANGE="compile=true"',
        ),
    ],
)
def test_a_run_ends_with_its_result_the_file_to_open_and_what_to_try_next(changes, result, next_try):
    text = summary(content(trial={**TRIAL, **changes}))
    _, second, third = text.splitlines()
    assert text.startswith(result)
    assert second == "Open results/report/ladder.html for all tables and pictures"
    assert third.startswith(f"Try next: {next_try}")


def test_the_next_switch_is_one_of_the_fastest_level_or_of_all_levels_if_none_is_faster():
    table = [["level", "switch"], ["fp32", "the speed shape only"], ["a", "init: gpt2, compile: true"], ["b", "c: d"]]

    def next_try(fastest: str, **changes: str) -> str:
        report = {**content(trial={**TRIAL, "changes": changes}), "speed": table, "fastest": fastest}
        return summary(report).splitlines()[-1]

    assert 'CHANGE="init=gpt2"' in next_try("a", attention="flash")
    assert 'CHANGE="compile=true" adds this switch' in next_try("a", init="gpt2")
    assert "make show compares" in next_try("a", init="gpt2", compile="true")
    assert 'CHANGE="c=d"' in next_try("", init="gpt2", compile="true")
    table[2].append("no effect on this device")
    assert 'CHANGE="c=d"' in next_try("", attention="flash")


@pytest.mark.parametrize("page", [markdown, html])
def test_a_level_without_effect_is_named_so_in_the_table_and_in_the_notes(page):
    run = measurement(fp32=[300.0] * 4, bf16=[150.0] * 4)
    reason = "it has no effect on this device: TF32 is a mode of NVIDIA GPUs"
    results = {**dict.fromkeys(LEVELS, TRAINED), "tf32": {**SKIPPED, "reason": reason}}
    parity = {**PARITY, "levels": {name: PARITY["levels"][name] for name in run.levels}}
    text = page(content(gains=gains(run), parity=parity, results=results))
    assert text.count("no effect on this device") == 2
    assert reason in text


def test_without_the_h100s_file_its_gains_are_not_shown():
    report = content(gains=gains(EVEN)) | {"reference": None}
    assert "no fast bf16" in markdown(report)
    assert "On an H100" not in markdown(report)


@pytest.mark.parametrize("page", [markdown, html])
def test_a_gain_within_the_controls_interval_is_explained_although_its_own_excludes_one(page):
    run = measurement(fp32=[300.0] * 4, tf32=[306.0] * 4, control=[294.0, 306.0, 291.0, 309.0])
    text = unescape(page(content(gains=gains(run) | {"control": {"ratio": 1.0, "low": 0.95, "high": 1.04}})))
    assert "no measurable gain [0.98, 0.98]" in text
    assert "gave 1.00 [0.95, 1.04]" in text
    assert "although its interval excludes 1.0" in text


def test_the_report_shows_what_a_gpu_did_in_a_step():
    assert "What the GPU did" not in markdown(content()) + html(content())
    found = content(device_time={"bf16": {"busy_ms": 34.62, "idle_ms": 3.55, "long_gaps_ms": 2.33}})
    assert found["device_time"][1] == ["bf16", "34.62", "3.55", "2.33", "1.22"]
    for page in (markdown(found), html(found)):
        assert "What the GPU did" in page
        assert "34.62" in page


def test_the_report_shows_the_seconds_of_every_stage_and_their_sum():
    spent = {"imports": 1.62, "steps": 20.0, "exit": 0.04}
    found = content(seconds={name: dict.fromkeys(PHASES, 0.0) | spent for name in ("overfit", "train/bf16")})
    titles, *table = found["seconds"]
    rows = {row[0]: dict(zip(titles, row, strict=True)) for row in table}
    assert (
        rows["overfit"] | {"imports": "1.6", "steps": "20.0", "exit": "\N{EN DASH}", "all": "21.7"} == rows["overfit"]
    )
    assert rows["all"] | {"imports": "3.2", "steps": "40.0", "exit": "0.1", "all": "43.3"} == rows["all"]
    for page in (markdown(found), html(found)):
        assert "Where the climb" in page
        assert "train/bf16" in page


def test_the_ten_costliest_operators_are_shown():
    text = html(content(profile={"bf16": profiled({f"aten::op{index}": 20.0 - index for index in range(12)})}))
    assert "aten::op9" in text
    assert "aten::op10" not in text


def test_the_page_states_that_a_stand_in_was_used():
    note = "OpenAI's weights were NOT verified: dvc repro -f download"
    assert f"- {note}" in markdown(content("stand-in", note))
    assert "random stand-in weights" in html(content("stand-in", note))
    assert "NOT verified" not in markdown(content())


def test_two_machines_are_compared_by_ratios_within_each():
    here, there = RUN, measurement(fp32=[30.0] * 4, bf16=[10.0] * 4, padded=[9.0] * 4)
    assert tables.side_by_side(here, there)[1:] == [
        ["fp32", "300", tables.MISSING, "30", tables.MISSING],
        ["tf32", "300", "no measurable gain [1.00, 1.00]", tables.MISSING, tables.MISSING],
        ["bf16", "150", "2.00 [1.99, 2.01]", "10", "3.00 [3.00, 3.00]"],
        ["compile", "120", "1.25 [1.24, 1.50]", tables.MISSING, tables.MISSING],
        ["padded", tables.MISSING, tables.MISSING, "9", "1.11 [1.11, 1.11]"],
    ]


def test_a_smaller_micro_batch_is_noted():
    assert facts.micro_batch_notes({"fp32": {"micro_batch": 2}, "bf16": {"micro_batch": 2}}, 2) == []
    (note,) = facts.micro_batch_notes({"fp32": {"micro_batch": 4}, "bf16": {"micro_batch": 4}}, 16)
    assert note == "only 4 of the 16 rows of a batch fit into memory: gradients were accumulated"
    _, other = facts.micro_batch_notes({"fp32": {"micro_batch": 8}, "bf16": {"micro_batch": 4}}, 16)
    assert other.startswith("`fp32` was trained with 8 rows at a time, other levels with 4")


def test_trainings_on_several_devices_are_noted_with_their_share_of_the_peak():
    trainings = {name: {**TRAINED, "devices": 8} for name in ("fp32", "tf32", "bf16", "compile", "trial")}
    (note,) = facts.device_notes(trainings, gains(), "A processor")  # ranks may share a CPU, so no share is shown
    assert "were trained on 8 devices: training tokens/s are the sum over all devices" in note
    trainings["fp32"] = {**trainings["fp32"], "tokens_per_second": 6000.0}
    notes = facts.device_notes(trainings, gains(), "NVIDIA L4")
    # one device reaches 1,000 tokens/s at half its peak, so 750 tokens/s each are three quarters of that half
    assert "`fp32` trained at 38% of the peak of all 8 devices" in notes
    assert not any("tf32" in note for note in notes)  # its peak is not known
    assert facts.device_notes({**trainings, "trial": TRAINED}, gains(), "NVIDIA L4") == []


def test_trainings_on_different_numbers_of_devices_are_refused():
    results = dict.fromkeys(LEVELS, TRAINED)
    with pytest.raises(UserError, match="different numbers of devices"):
        content(results={**results, "bf16": {**TRAINED, "devices": 8}})
    content(results={**results, "untied": {**TRAINED, "devices": 8}})  # quality levels are not compared in speed
