"""Gains estimated from times whose true ratio is known."""

import math

import numpy as np
import pytest
import scipy.stats

from gpt2_ladder.config import UserError
from gpt2_ladder.measuring import gains
from gpt2_ladder.measuring.gains import NO_GAIN, Gain, Measurement
from helpers.common import measurement


def noisy(ms: float, rounds: int, seed: int, spread: float = 0.05) -> list[float]:
    """Times around `ms`, log-normal."""
    return list(ms * np.exp(np.random.default_rng(seed).normal(0, spread, rounds)))


def test_a_drift_by_a_factor_of_two_does_not_change_the_gain():
    drift = np.linspace(1, 2, 20)
    slow, fast = 300 * drift * np.array(noisy(1, 20, 0)), 200 * drift * np.array(noisy(1, 20, 1))
    gain = gains.gain(list(slow), list(fast))
    assert gain.ratio == pytest.approx(1.5, rel=0.05)
    assert gain.high - gain.low < 0.15  # the drift of the times alone would make it 0.3
    assert 300 * drift[:10].mean() / (200 * drift[10:].mean()) < 1.1  # two trainings, one after the other


def test_an_outlier_does_not_change_the_gain():
    slow, fast = [300.0] * 9 + [3000.0], [200.0] * 10
    assert gains.gain(slow, fast).ratio == pytest.approx(1.5)


def test_the_interval_holds_the_truth_in_19_of_20_cases():
    intervals = [gains.gain(noisy(120, 6, 2 * seed), noisy(100, 6, 2 * seed + 1)) for seed in range(60)]
    assert sum(gain.low <= 1.2 <= gain.high for gain in intervals) >= 52  # 57 expected, standard deviation 1.7


def test_the_same_times_give_the_same_interval():
    times = noisy(300, 8, 0), noisy(200, 8, 1)
    assert gains.gain(*times) == gains.gain(*times)


@pytest.mark.parametrize(
    ("gain", "control", "verdict"),
    [
        (Gain(1.5, 1.4, 1.6), Gain(1.0, 0.98, 1.02), "faster"),
        (Gain(0.8, 0.7, 0.9), Gain(1.0, 0.98, 1.02), "slower"),
        (Gain(1.1, 0.95, 1.2), Gain(1.0, 0.98, 1.02), NO_GAIN),  # the interval holds 1.0
        (Gain(1.03, 1.01, 1.05), Gain(1.0, 0.96, 1.01), NO_GAIN),  # the baseline over itself may be as large
        (Gain(1.03, 1.01, 1.05), Gain(1.0, 0.98, 1.01), "faster"),
    ],
)
def test_a_gain_within_the_noise_is_no_gain(gain, control, verdict):
    assert gains.verdict(gain, control) == verdict


def test_the_count_to_settle_grows_with_the_square_of_the_uncertainty():
    gain, control = Gain(1.02, 1.02 / 1.04, 1.02 * 1.04), Gain(1.0, 0.99, 1.01)
    assert gains.count_to_settle(gain, control, 8) == 25  # four times as many, or fewer, because t is smaller for more
    assert gains.count_to_settle(gain, control, 1000) == pytest.approx(
        1000 * (math.log(1.04) / math.log(1.02)) ** 2, rel=0.01
    )
    assert gains.count_to_settle(Gain(1.0, 0.9, 1.1), control, 8) is None
    assert gains.count_to_settle(Gain(1.03, 1.0, 1.04), control, 8) == 9  # more than the 8 that were not enough


def test_any_two_levels_can_be_compared():
    run = measurement(fp32=[300.0] * 4, bf16=[150.0] * 4, flash=[100.0] * 4)
    assert run.gain("bf16", "flash").ratio == pytest.approx(2 / 3)
    entry = run.compare("flash", "bf16", run.noise())
    assert [entry[key] for key in ("ratio", "low", "high")] == pytest.approx([1.5] * 3)
    assert (entry["over"], entry["verdict"], entry["count_to_settle"]) == ("bf16", "faster", None)
    with pytest.raises(UserError, match="level 'fp16' was not measured; choose from fp32, bf16, flash"):
        run.gain("fp16", "fp32")


def test_the_control_sets_the_noise():
    times = noisy(300, 8, 0)
    run = measurement(control=noisy(300, 8, 1), fp32=times, bf16=[t / 1.001 for t in times])
    assert run.noise().uncertainty > 0.01
    entry = run.compare("bf16", "fp32", run.noise())  # equal noise in both cancels, so the interval is narrow
    assert entry["verdict"] == NO_GAIN
    assert entry["count_to_settle"] is None  # over 10,000


def in_processes(*gains: float) -> Measurement:
    """Return a measurement with six equal rounds in each process, in which `bf16` has one of `gains`."""
    run = measurement(fp32=[100.0 * gain for gain in gains for _ in range(6)], bf16=[100.0] * 6 * len(gains))
    rounds = [each.model_copy(update={"process": index // 6}) for index, each in enumerate(run.rounds)]
    return run.model_copy(update={"rounds": rounds})


def test_the_interval_of_several_processes_has_their_variance():
    run = in_processes(1.9, 2.0, 2.1)
    assert run.processes == 3
    assert run.estimates("bf16", "fp32") == pytest.approx([1.9, 2.0, 2.1])
    logs = np.log([1.9, 2.0, 2.1])
    expected = scipy.stats.t.interval(0.95, 2, loc=logs.mean(), scale=scipy.stats.sem(logs))
    gain = run.gain("bf16", "fp32")
    assert (math.log(gain.low), math.log(gain.high)) == pytest.approx(expected)
    assert gain.ratio == pytest.approx(math.exp(logs.mean()))
    one = run.model_copy(update={"rounds": run.rounds[:6]}).gain("bf16", "fp32")
    assert one.high - one.low < 1e-9 < gain.high - gain.low


def test_an_interval_of_five_processes_holds_the_truth_in_95_of_100_cases():
    dice = np.random.default_rng(0)
    intervals = [gains.gain_between(np.exp(dice.normal(0.1, 0.005, 5))) for _ in range(1000)]
    held = sum(gain.low <= math.exp(0.1) <= gain.high for gain in intervals)
    assert 930 <= held <= 970


def test_the_processes_to_settle_a_gain_are_counted_in_processes():
    run = in_processes(0.99, 1.02, 1.03)
    entry = run.compare("bf16", "fp32", run.noise())
    assert entry["verdict"] == NO_GAIN
    assert 3 < entry["count_to_settle"] < 100
