"""Gains from times whose truth is known."""

import math

import numpy as np
import pytest

from gpt2_ladder.config import UserError
from gpt2_ladder.measuring import gains
from gpt2_ladder.measuring.gains import NO_GAIN, Gain
from helpers.common import measurement


def noisy(ms: float, rounds: int, seed: int, spread: float = 0.05) -> list[float]:
    """Times around `ms`, log-normal."""
    return list(ms * np.exp(np.random.default_rng(seed).normal(0, spread, rounds)))


def test_a_machine_that_drifts_by_a_factor_of_two_does_not_move_the_gain():
    drift = np.linspace(1, 2, 20)
    slow, fast = 300 * drift * np.array(noisy(1, 20, 0)), 200 * drift * np.array(noisy(1, 20, 1))
    found = gains.gain(list(slow), list(fast))
    assert found.ratio == pytest.approx(1.5, rel=0.05)
    assert found.high - found.low < 0.15  # of the times themselves, the drift alone would give an interval of 0.3
    one_after_the_other = 300 * drift[:10].mean() / (200 * drift[10:].mean())
    assert one_after_the_other < 1.1  # what two trainings in turn would have shown


def test_one_outlier_does_not_move_the_gain():
    slow, fast = [300.0] * 9 + [3000.0], [200.0] * 10
    assert gains.gain(slow, fast).ratio == pytest.approx(1.5)


@pytest.mark.parametrize("rounds", [6, 30])
def test_the_interval_holds_the_truth_in_19_of_20_cases(rounds):
    held = 0
    for seed in range(60):
        found = gains.gain(noisy(120, rounds, 2 * seed), noisy(100, rounds, 2 * seed + 1))
        held += found.low <= 1.2 <= found.high
    assert held >= 52  # 57 expected, a standard deviation is 1.7


def test_the_same_times_give_the_same_interval():
    times = noisy(300, 8, 0), noisy(200, 8, 1)
    assert gains.gain(*times) == gains.gain(*times)


@pytest.mark.parametrize(
    ("found", "control", "word"),
    [
        (Gain(1.5, 1.4, 1.6), Gain(1.0, 0.98, 1.02), "faster"),
        (Gain(0.8, 0.7, 0.9), Gain(1.0, 0.98, 1.02), "slower"),
        (Gain(1.1, 0.95, 1.2), Gain(1.0, 0.98, 1.02), NO_GAIN),  # the interval holds 1.0
        (Gain(1.03, 1.01, 1.05), Gain(1.0, 0.96, 1.01), NO_GAIN),  # the baseline against itself is as far off
        (Gain(1.03, 1.01, 1.05), Gain(1.0, 0.98, 1.01), "faster"),
    ],
)
def test_what_noise_can_do_is_no_gain(found, control, word):
    assert gains.verdict(found, control) == word


def test_rounds_to_settle_grow_with_the_square_of_what_is_missing():
    found, control = Gain(1.02, 1.02 / 1.04, 1.02 * 1.04), Gain(1.0, 0.99, 1.01)
    expected = 8 * (math.log(1.04) / math.log(1.02)) ** 2
    assert gains.rounds_to_settle(found, control, 8) == math.ceil(expected) == 32
    assert gains.rounds_to_settle(Gain(1.0, 0.9, 1.1), control, 8) is None
    assert gains.rounds_to_settle(Gain(1.03, 1.0, 1.04), control, 8) == 9  # never the rounds that did not settle it


def test_any_two_levels_can_be_compared():
    run = measurement(fp32=[300.0] * 4, bf16=[150.0] * 4, flash=[100.0] * 4)
    assert run.gain("flash", "fp32").ratio == pytest.approx(3)
    assert run.gain("bf16", "flash").ratio == pytest.approx(2 / 3)
    found = run.compare("flash", "bf16", run.noise())
    assert [found[key] for key in ("ratio", "low", "high")] == pytest.approx([1.5] * 3)
    assert (found["over"], found["verdict"], found["rounds_to_settle"]) == ("bf16", "faster", None)
    with pytest.raises(UserError, match="level 'fp16' was not measured; there are fp32, bf16, flash"):
        run.gain("fp16", "fp32")


def test_the_control_is_the_noise():
    times = noisy(300, 8, 0)
    run = measurement(control=noisy(300, 8, 1), fp32=times, bf16=[t / 1.001 for t in times])
    assert run.noise().uncertainty > 0.01
    found = run.compare("bf16", "fp32", run.noise())  # equal noise in both cancels; the control says that it need not
    assert found["verdict"] == NO_GAIN
    assert found["rounds_to_settle"] > 100
