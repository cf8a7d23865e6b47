"""Estimate gains, with their intervals, from the step times of the benchmark, and compare them with the noise.

A gain is a ratio of times: 1.3 means 1.3 times as many tokens in the same time. Times are compared within a round, in
which every level takes one step, because the machine changes little during a round.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, norm, sem, t

from gpt2_ladder.config import Environment, Strict, UserError

ESTIMATOR = "Hodges-Lehmann estimate of the per-round log ratios"  # chosen by experiments/estimators.py
BETWEEN = "mean of the processes' log ratios, with Student's t"
CONFIDENCE, RESAMPLES = 0.95, 9999
MOST_COUNT = 10_000  # rounds or processes
NO_GAIN = "no measurable gain"


class Round(Strict):
    """One round of the benchmark: every level takes one step on the same batch."""

    order: list[str]  # names of the levels, in the order of their steps
    step_ms: dict[str, float]  # milliseconds of each level's step
    matmul_tflops: dict[str, float]  # TFLOP/s of a bare matrix product by precision; empty: not measured
    process: int = 0  # the index of the process that measured this round


class Measurement(Strict):
    """The content of results/benchmark.json."""

    estimator: str
    model: str
    batch_size: int
    block_size: int
    levels: list[str]  # names in the ladder's order; the first is the baseline
    control: str  # name of the baseline's second arm
    environment: Environment
    rounds: list[Round]  # the oldest first

    def step_ms(self, level: str) -> list[float]:
        """Return the step time of `level` in each round. Raise UserError if `level` was not measured."""
        if level not in (*self.levels, self.control):
            raise UserError(f"level '{level}' was not measured; choose from {', '.join(self.levels)}")
        return [round_.step_ms[level] for round_ in self.rounds]

    @property
    def processes(self) -> int:
        """The number of processes that measured the rounds."""
        return len({round_.process for round_ in self.rounds})

    def gain(self, level: str, over: str) -> "Gain":
        """Return the gain of `level` compared with the level `over`."""
        if self.processes == 1:
            return gain(self.step_ms(over), self.step_ms(level))
        return gain_between(self.estimates(level, over))

    def estimates(self, level: str, over: str) -> list[float]:
        """Return the estimated gain of `level` over the level `over` in each process."""
        times, processes = np.array([self.step_ms(over), self.step_ms(level)]), [each.process for each in self.rounds]
        return [float(estimate(*times[:, np.equal(processes, process)])) for process in dict.fromkeys(processes)]

    def noise(self) -> "Gain":
        """Return the measured gain of the baseline over itself. It is 1.0 on a machine without noise."""
        return self.gain(self.control, self.levels[0])

    def compare(self, level: str, over: str, noise: "Gain") -> dict[str, Any]:
        """Return one entry of gains.json: the gain of `level` over `over`, compared with `noise`."""
        result = self.gain(level, over)
        judgement = verdict(result, noise)
        count = len(self.rounds) if self.processes == 1 else self.processes
        needed = count_to_settle(result, noise, count) if judgement == NO_GAIN else None
        return {"over": over, **asdict(result), "verdict": judgement, "count_to_settle": needed}


@dataclass(frozen=True)
class Gain:
    """The gain of one level over another, with its 95 % interval."""

    ratio: float  # 1.3: the level is 1.3 times as fast as the other
    low: float  # lower end of the interval of `ratio`
    high: float  # upper end

    @property
    def uncertainty(self) -> float:
        """The distance between 1.0 and the farther end of the interval, as a logarithm."""
        return max(abs(math.log(self.low)), abs(math.log(self.high)))

    def __str__(self) -> str:
        return f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(slow_ms: Any, fast_ms: Any, axis: int = -1) -> Any:
    """Estimate the gain along `axis` of two arrays of times as the median of all pairwise means of the log ratios.

    It is nearly as precise as the mean of the log ratios, and robust if another program disturbed some rounds.

    Source: Hodges and Lehmann 1963, "Estimates of location based on rank tests".
    """
    ratios = np.moveaxis(np.log(np.asarray(slow_ms) / np.asarray(fast_ms)), axis, -1)  # (..., rounds)
    i, j = np.triu_indices(ratios.shape[-1])
    return np.exp(np.median((ratios[..., i] + ratios[..., j]) / 2, axis=-1))


def gain(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> Gain:
    """Return the gain of a level with times `fast_ms` over a level with times `slow_ms`, one time of each per round.

    The interval is a percentile bootstrap over the rounds with a fixed seed, widened by Student's t. Without that, the
    interval of eight rounds would contain the true gain in 92 % of cases instead of 95 %.

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


def gain_between(estimates: Sequence[float]) -> Gain:
    """Return the gain of a level whose gains in several fresh processes are `estimates`.

    The interval is Student's t on their logarithms, so it also has the variance between processes: the same level took
    37.8, 38.0 and 38.5 ms in three processes on an H100, within each of which it varied by 0.3 %.
    """
    logs = np.log(estimates)
    width = t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * sem(logs)
    return Gain(*(math.exp(logs.mean() + shift) for shift in (0, -width, width)))


def verdict(gain: Gain, control: Gain) -> str:
    """Return "faster" or "slower", or NO_GAIN if noise may explain `gain`.

    Noise may explain it if its interval contains 1.0, or if the interval of `control`, the measured gain of the
    baseline over itself, reaches as far from 1.0.
    """
    if gain.low <= 1 <= gain.high or abs(math.log(gain.ratio)) <= control.uncertainty:
        return NO_GAIN
    return "faster" if gain.ratio > 1 else "slower"


def count_to_settle(gain: Gain, control: Gain, count: int) -> int | None:
    """Estimate how many rounds or processes show that `gain`, measured in `count`, is not noise.

    An interval of n is as wide as Student's t / sqrt(n). Return None if MOST_COUNT are not enough.
    """
    effect = abs(math.log(gain.ratio))
    towards_one = abs(math.log(gain.ratio / (gain.low if gain.ratio > 1 else gain.high)))
    counts = np.arange(count, MOST_COUNT + 1)
    widths = t.ppf((1 + CONFIDENCE) / 2, counts - 1) / np.sqrt(counts)
    enough = counts[1:][widths[1:] / widths[0] * max(towards_one, control.uncertainty) <= effect]
    return int(enough[0]) if len(enough) else None
