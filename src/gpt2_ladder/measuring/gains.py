"""Estimate gains from the times of steps taken in turn, with an interval, and compare them with the noise.

A gain is a ratio of times: 1.3 means 1.3 times as many tokens in the same time. Times are paired, one of each level per
round, so that both of a pair meet the same state of the machine.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, norm, t

from gpt2_ladder.config import Environment, Strict, UserError

# Chosen by experiment: experiments/estimators.py makes the table in docs/LOG.md.
ESTIMATOR = "Hodges-Lehmann estimate of the per-round log ratios"
CONFIDENCE, RESAMPLES = 0.95, 9999
NO_GAIN = "no measurable gain"


class Round(Strict):
    """One step of every level, on the same batch: their order and milliseconds.

    `matmul_tflops` is the rate of a bare matrix product in this round by precision, empty if not measured.
    """

    order: list[str]
    step_ms: dict[str, float]
    matmul_tflops: dict[str, float]


class Measurement(Strict):
    """The content of results/benchmark.json: every round in order of time, and the conditions.

    `levels` are in the ladder's order, the baseline first; `control` is the name of the baseline's second arm.
    """

    estimator: str
    model: str
    batch_size: int
    block_size: int
    levels: list[str]
    control: str
    environment: Environment
    rounds: list[Round]

    def step_ms(self, level: str) -> list[float]:
        """Return the milliseconds of `level`, one per round; raise UserError if it was not measured."""
        if level not in (*self.levels, self.control):
            raise UserError(f"level '{level}' was not measured; choose from {', '.join(self.levels)}")
        return [round_.step_ms[level] for round_ in self.rounds]

    def gain(self, level: str, over: str) -> "Gain":
        """Return how many times as fast `level` is as `over`, for any two levels."""
        return gain(self.step_ms(over), self.step_ms(level))

    def noise(self) -> "Gain":
        """Return the gain of the baseline over itself, 1.0 on a machine without noise."""
        return self.gain(self.control, self.levels[0])

    def compare(self, level: str, over: str, noise: "Gain") -> dict[str, Any]:
        """Return the gain of `level` over `over` and its verdict against `noise`, as one entry of gains.json."""
        result = self.gain(level, over)
        word = verdict(result, noise)
        rounds = rounds_to_settle(result, noise, len(self.rounds)) if word == NO_GAIN else None
        return {"over": over, **asdict(result), "verdict": word, "rounds_to_settle": rounds}


@dataclass(frozen=True)
class Gain:
    """How many times as fast one level is as another: the estimate, and the ends of its 95 % bootstrap interval."""

    ratio: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """The largest distance of the interval from 1.0, in logarithms."""
        return max(abs(math.log(self.low)), abs(math.log(self.high)))

    def __str__(self) -> str:
        return f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(slow_ms: Any, fast_ms: Any, axis: int = -1) -> Any:
    """Return ESTIMATOR of paired times, two arrays of one shape, over `axis`: the median of all pairwise means.

    Nearly as precise as the mean for well-behaved noise, and robust against rounds that another program disturbed.

    Source: Hodges and Lehmann 1963, "Estimates of location based on rank tests".
    """
    ratios = np.moveaxis(np.log(np.asarray(slow_ms) / np.asarray(fast_ms)), axis, -1)  # (..., rounds)
    i, j = np.triu_indices(ratios.shape[-1])
    return np.exp(np.median((ratios[..., i] + ratios[..., j]) / 2, axis=-1))


def gain(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> Gain:
    """Return the gain of a level that took `fast_ms` over one that took `slow_ms`, paired by round.

    The interval is a percentile bootstrap over the rounds, widened as Student's t is against the normal distribution:
    without that, the interval of eight rounds would hold the truth in 92 of 100 cases. It is deterministic.

    Source: Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3.
    """
    rounds = len(slow_ms)
    tail = norm.cdf(-math.sqrt(rounds / (rounds - 1)) * t.ppf((1 + CONFIDENCE) / 2, rounds - 1))
    interval = bootstrap(
        (np.array(slow_ms), np.array(fast_ms)),
        estimate,
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * tail,
        method="percentile",
        batch=max(1, 5_000_000 // rounds**2),  # limits memory to 20 MB
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Gain(float(estimate(slow_ms, fast_ms)), float(interval.low), float(interval.high))


def verdict(gain: Gain, control: Gain) -> str:
    """Return "faster", "slower", or NO_GAIN where noise may be the cause.

    That is if the interval holds 1.0, or if `control`, the gain of the baseline over itself, may be as large as `gain`.
    """
    if gain.low <= 1 <= gain.high or abs(math.log(gain.ratio)) <= control.uncertainty:
        return NO_GAIN
    return "faster" if gain.ratio > 1 else "slower"


def rounds_to_settle(gain: Gain, control: Gain, rounds: int) -> int | None:
    """Return roughly how many rounds, instead of `rounds`, would distinguish `gain` from noise; None if it is 1.0."""
    effect = abs(math.log(gain.ratio))
    if effect == 0:
        return None
    # an interval shrinks with the square root of the number of rounds
    towards_one = abs(math.log(gain.ratio / (gain.low if gain.ratio > 1 else gain.high)))
    return max(rounds + 1, math.ceil(rounds * (max(towards_one, control.uncertainty) / effect) ** 2))
