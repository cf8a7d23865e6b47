"""The tools that are no stage: compare and plan."""

import math
import re

import pytest

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.measuring import trials
from gpt2_ladder.measuring.gains import Gain
from helpers.common import REPOSITORY, environment, measurement, params_with
from pipeline import BENCHMARK, ENVIRONMENT, TRIAL_FACTS
from pipeline.tools import compare, plan


def test_two_levels_or_two_machines_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_json(BENCHMARK, measurement(fp32=[300.0] * 4, bf16=[150.0] * 4, padded=[75.0] * 4).model_dump())
    compare.main("padded", "bf16")
    shown = "padded is 2.00 [2.00, 2.00] times as fast as bf16: faster\nmeasured on A processor, 2 threads"
    assert shown in capsys.readouterr().out
    (tmp_path / "machines").symlink_to(REPOSITORY / "machines")
    compare.main("machines/h100-sxm.json")
    shown = capsys.readouterr().out
    assert "other machine: NVIDIA H100" in shown
    assert re.search(r"\| bf16 +\| +150 \| +2\.00 \[2\.00, 2\.00\] \| +172 \| +1\.09 \[1\.09, 1\.09\] \|", shown)


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(BENCHMARK, measurement(fp32=[300.0] * 4).model_dump())
    with pytest.raises(UserError, match="level 'fp16' was not measured; choose from fp32"):
        compare.main("fp16", "fp32")
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", ""):
        with pytest.raises(UserError, match=rf"{name or '.'}: not a file of the gallery: "):
            compare.main(name)
    with pytest.raises(UserError, match="0 arguments: name two levels"):
        compare.main()


@pytest.fixture
def measured(tmp_path, monkeypatch) -> None:
    """A trial that is 1.8 times as fast as fp32, and a benchmark in which bf16 is twice as fast."""
    monkeypatch.chdir(tmp_path)
    write_json(BENCHMARK, measurement(fp32=[300.0] * 6, bf16=[150.0] * 6).model_dump())
    write_json(TRIAL_FACTS, trials.judge(measurement(fp32=[360.0] * 6, trial=[200.0] * 6)))


def test_the_trial_is_compared_with_a_level_by_their_gains_over_fp32(measured, capsys):
    compare.main("trial", "bf16")
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first == "trial is 0.90 [0.90, 0.90] times as fast as bf16: slower"
    assert second.startswith("1.80 [1.80, 1.80] / 2.00 [2.00, 2.00], both over fp32: measured apart, so the variances")
    assert third.startswith("trial: A processor, 2 threads")
    assert fourth.startswith("levels: A processor, 2 threads")
    compare.main("bf16", "trial")
    assert "bf16 is 1.11 [1.11, 1.11] times as fast as trial: faster" in capsys.readouterr().out
    compare.main("trial", "fp32")
    assert "trial is 1.80 [1.80, 1.80] times as fast as fp32: faster\nmeasured on" in capsys.readouterr().out


def test_the_variances_of_two_gains_add_as_logarithms():
    quotient = compare.divide(Gain(1.2, 1.2 / 1.03, 1.2 * 1.03), Gain(1.5, 1.5 / 1.04, 1.5 * 1.04))
    width = math.sqrt(math.log(1.03) ** 2 + math.log(1.04) ** 2)
    assert quotient.ratio == pytest.approx(0.8)
    assert (quotient.low, quotient.high) == pytest.approx((0.8 * math.exp(-width), 0.8 * math.exp(width)))


def test_a_trial_that_cannot_be_compared_is_refused(measured):
    with pytest.raises(UserError, match="level 'flash' was not measured; choose from fp32, bf16"):
        compare.main("trial", "flash")
    other = measurement(fp32=[360.0] * 6, trial=[200.0] * 6).model_copy(update={"block_size": 1024})
    write_json(TRIAL_FACTS, trials.judge(other))
    with pytest.raises(UserError, match="the trial and the benchmark differ in block_size"):
        compare.main("trial", "bf16")
    write_json(TRIAL_FACTS, {"gain": None, "not_measured": "no compiler"})
    for level in ("bf16", "fp32"):
        with pytest.raises(UserError, match="the trial was not measured: no compiler"):
            compare.main("trial", level)


def test_a_plan_shows_what_fits_and_refuses_an_amount_that_is_no_memory(tmp_path, monkeypatch, capsys):
    levels = {name: params_with().levels[name] for name in ("init", "fp32")}
    params = params_with(model="tiny", levels=levels)
    monkeypatch.setattr(params_yaml, "load", lambda: params)
    monkeypatch.chdir(tmp_path)
    write_json(ENVIRONMENT, environment(threads=1).model_dump())
    for arguments, title in (((), "on A processor, "), (("--memory", "2GiB"), "an NVIDIA GPU with 2GiB free")):
        plan.main(*arguments)
        table = capsys.readouterr().out
        assert title in table
        assert [name for name in levels if f" {name} " in table] == ["fp32"]  # not the quality level
    assert (plan.parse_memory("24GiB"), plan.parse_memory("1.5 gb")) == (24 * 2**30, 1_500_000_000)
    for memory in ("much", "", "24", f"{10**400}GiB"):
        with pytest.raises(UserError, match=f"--memory {memory}: write a number and a unit, such as 24GiB"):
            plan.main("--memory", memory)
