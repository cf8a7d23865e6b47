"""The batch curve: what fits, the order of steps, and the numbers of a row. Speed itself is not tested."""

import json
import sys

import pytest
import torch

from experiments import batch_curve, scaling
from experiments.batch_curve import Plan, Turn
from gpt2_ladder.config import MINIMUM_ROUNDS
from gpt2_ladder.measuring.turns import Arm
from gpt2_ladder.training import devices
from helpers.common import REPOSITORY, environment, params_with

CPU = torch.device("cpu")
TINY = Plan("fp32", 8, rehearsal=True, batch_sizes=(1, 2, 4), control=2, block_size=16, seconds=0)


@pytest.fixture
def small_products(monkeypatch):
    monkeypatch.setitem(devices.PRODUCT_SIZES, "cpu", 64)


def fail_at_four(monkeypatch, error: Exception) -> None:
    """Let every step with four rows raise `error`."""
    step = Arm.step

    def limited(arm, batch, device):
        if arm.micro_batch == 4:
            raise error
        return step(arm, batch, device)

    monkeypatch.setattr(Arm, "step", limited)


def test_a_batch_that_does_not_fit_is_reported_and_the_others_are_measured(
    tmp_path, monkeypatch, capsys, small_products
):
    fail_at_four(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    batch_curve.run(TINY, params_with(model="tiny"), environment(), tmp_path)
    report = json.loads((tmp_path / "batch-curve-rehearsal.json").read_text())
    assert [(row["batch_size"], row["fits"]) for row in report["rows"]] == [(1, True), (2, True), (4, False)]
    assert all(row["predicted_mib"] > 0 for row in report["rows"])
    assert all(row["tokens_per_second"] > 0 and row["mfu_of_product"] > 0 for row in report["rows"][:2])
    assert report["rounds"] == len(report["rows"][0]["rounds_ms"]) == MINIMUM_ROUNDS  # there was no time for more
    assert (tmp_path / "batch-curve-rehearsal.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert printed.startswith("REHEARSAL. Level fp32, T = 16, B (predicted GiB): 1 (")
    assert "B = 4: does not fit" in printed
    assert "| 4 | does not fit |" in printed


def test_any_other_error_ends_the_measurement(tmp_path, monkeypatch):
    fail_at_four(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        batch_curve.run(TINY, params_with(model="tiny"), environment(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_turn_empties_the_cache_and_does_not_time_its_first_step(monkeypatch):
    events, times = [], iter([99.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(devices, "reset_peak_memory", lambda _: events.append("empty"))
    monkeypatch.setattr(Arm, "step", lambda *_: events.append("step") or next(times))
    turn = batch_curve.take_turn(Arm("1", *2 * [None], "fp32", 1), (torch.zeros(1), torch.zeros(1)), CPU)
    assert events == ["empty", *["step"] * 4]
    assert (turn.step_ms, turn.reserved_mib) == (2.0, None)


def test_a_row_has_the_median_rate_and_the_largest_memory():
    results = [Turn(1000.0, 100.0, 300.0), Turn(2000.0, 120.0, 310.0), Turn(1000.0, 110.0, 305.0)]
    plan = Plan("fused", 3)
    row = batch_curve.describe(plan, params_with(), results, [28.0, 28.0, 28.0], 140.0, batch_size=16)
    assert row["tokens_per_second"] == 16 * 1024
    assert row["mfu"] == pytest.approx(0.1, rel=0.01)  # 855 MFLOP a token: 14.0 TFLOP
    assert row["mfu_of_product"] == pytest.approx(0.5, rel=0.01)
    assert (row["allocated_mib"], row["reserved_mib"]) == (120.0, 310.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-curve"], "error: --batch-curve needs an NVIDIA GPU, but this is A processor; add --rehearse"),
        (["--batch-curve", "--level", "untied"], "error: --level untied: no such speed level; choose from fp32, "),
        (["--rehearse"], "--rehearse is for --batch-curve"),
        (["--batch-curve", "--rounds", "5"], "--rounds 5: too few for an interval; use at least 6"),
        (["--batch-curve", "--folder", "nowhere"], "--folder nowhere: there is no such folder"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(scaling.environment, "describe", environment)
    monkeypatch.setattr(batch_curve, "run", lambda *_: pytest.fail("the measurement started"))
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        scaling.main()
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
