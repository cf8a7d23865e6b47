"""The replication of gains in fresh processes: batches, coverage, and what is refused."""

import numpy as np
import pytest

from experiments import replication
from gpt2_ladder.config import CONTROL
from helpers.common import measurement, params_with


def test_five_of_twenty_perfect_processes_hold_the_mean_of_the_others_in_93_of_100_cases(monkeypatch):
    monkeypatch.setattr(replication, "SUBSETS", 200)
    dice = np.random.default_rng(0)
    rates = np.array([replication.coverage(np.exp(dice.normal(0.5, 0.01, 20))) for _ in range(40)])
    assert rates.mean(axis=0) == pytest.approx([0.93, 0.95], abs=0.015)


def test_the_interval_of_one_process_that_knows_only_its_own_noise_misses_the_others():
    dice = np.random.default_rng(0)
    gains = [gain for gain in np.exp(dice.normal(0.5, 0.05, 20)) for _ in range(6)]  # 5 % between processes
    noise = np.exp(dice.normal(0, 0.001, 120))
    run = measurement(fp32=[100.0] * 120, bf16=list(100 * noise / np.array(gains)))
    rounds = [each.model_copy(update={"process": index // 6}) for index, each in enumerate(run.rounds)]
    run = run.model_copy(update={"rounds": rounds})
    estimates = run.estimates("bf16", "fp32")
    assert estimates == pytest.approx(gains[::6], rel=0.002)
    assert replication.single_coverage(run, "bf16", "fp32", estimates) < 0.2
    assert replication.coverage(estimates)[0] > 0.8


def test_processes_an_hour_apart_are_another_batch():
    starts = [f"2026-11-27T{time}+00:00" for time in ("17:00:00", "17:05:00", "18:30:00", "18:35:00", "20:00:00")]
    run = replication.Replication(started=starts, measurement=measurement(fp32=[1.0], bf16=[1.0]))
    assert run.batches == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("chosen", [["fp32", "bf61"], ["bf16"]])
def test_levels_that_cannot_be_compared_are_refused(monkeypatch, chosen):
    rows = params_with().levels
    levels = {name: rows.get(name, rows["fp32"]) for name in ("fp32", "bf16", "flash", CONTROL)}
    monkeypatch.setattr(replication, "READ_LEVELS", lambda: (levels, 2))
    with pytest.raises(SystemExit, match="choose fp32 and others of fp32, bf16, flash, control"):
        replication.select(chosen)
    assert list(replication.select(["fp32", "flash"])) == ["fp32", "flash", CONTROL]
