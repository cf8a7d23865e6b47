"""Times of steps taken in turn -> how many times as fast, with an interval, and whether noise could have done it.

A gain is a ratio of times: 1.3 means 1.3 times the tokens in the same time. Times come in pairs, one of each level per
round, and a pair meets the same state of the machine.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, norm, t

from gpt2_ladder.config import Environment, Strict, UserError

# Chosen by experiment: docs/LOG.md has the table, experiments/estimators.py makes it.
ESTIMATOR = "Hodges-Lehmann estimate of the per-round log ratios"
CONFIDENCE, RESAMPLES = 0.95, 9999
NO_GAIN = "no measurable gain"


class Round(Strict):
    """One step of every level, on the same batch.

    Attributes:
        order: the levels' names, as they were stepped.
        step_ms: milliseconds by level.
        matmul_tflops: what a bare matrix product reached just then, by precision; empty where nobody asked.
    """

    order: list[str]
    step_ms: dict[str, float]
    matmul_tflops: dict[str, float]


class Measurement(Strict):
    """The whole of results/benchmark.json: every round, and under which conditions.

    Attributes:
        estimator: what the gains were estimated by when this was written.
        model: row of `models`.
        batch_size: B of every step.
        block_size: T of every step.
        levels: in the ladder's order; the first is the baseline.
        control: the name of the baseline's second arm.
        environment: the machine.
        rounds: in the order of time.
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
        """Return the milliseconds of `level`, one per round.

        Raises:
            UserError: it was not measured.
        """
        if level not in (*self.levels, self.control):
            raise UserError(f"level '{level}' was not measured; there are {', '.join(self.levels)}")
        return [one.step_ms[level] for one in self.rounds]

    def gain(self, level: str, over: str) -> "Gain":
        """Return how many times as fast `level` is as `over`; any two will do, they met in every round."""
        return gain(self.step_ms(over), self.step_ms(level))

    def noise(self) -> "Gain":
        """Return the gain of the baseline over itself, which would be 1.0 on a machine without noise."""
        return self.gain(self.control, self.levels[0])

    def compare(self, level: str, over: str, noise: "Gain") -> dict[str, Any]:
        """Return the gain of `level` over `over`, and what to call it beside `noise`, as gains.json has it."""
        found = self.gain(level, over)
        word = verdict(found, noise)
        settled = None if word != NO_GAIN else rounds_to_settle(found, noise, len(self.rounds))
        return {"over": over, **asdict(found), "verdict": word, "rounds_to_settle": settled}


@dataclass(frozen=True)
class Gain:
    """How many times as fast one level is as another, and the bootstrap interval around that.

    Attributes:
        ratio: the estimate.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    ratio: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """How far from 1.0, in logarithms, the interval reaches: what noise alone can look like, if the truth is 1."""
        return max(abs(math.log(self.low)), abs(math.log(self.high)))

    def __str__(self) -> str:
        return f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(slow_ms: Any, fast_ms: Any, axis: int = -1) -> Any:
    """Return ESTIMATOR of paired times, arrays of one shape, over `axis`.

    The median of the means of all pairs of rounds: hardly less precise than the mean where noise is well-behaved, and
    hardly moved by a round in which something else took the machine.

    Source: Hodges and Lehmann 1963, "Estimates of location based on rank tests".
    """
    ratios = np.moveaxis(np.log(np.asarray(slow_ms) / np.asarray(fast_ms)), axis, -1)  # (..., rounds)
    one, other = np.triu_indices(ratios.shape[-1])
    return np.exp(np.median((ratios[..., one] + ratios[..., other]) / 2, axis=-1))


def gain(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> Gain:
    """Return the gain of the level that took `fast_ms` over the one that took `slow_ms`, one pair a round.

    The interval is a percentile bootstrap over the rounds, expanded as Student's t is against the normal distribution:
    the plain one of eight rounds would hold the truth 92 times in a hundred. The same times give the same interval.

    Source: Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3.
    """
    rounds = len(slow_ms)
    tail = norm.cdf(-math.sqrt(rounds / (rounds - 1)) * t.ppf((1 + CONFIDENCE) / 2, rounds - 1))
    found = bootstrap(
        (np.array(slow_ms), np.array(fast_ms)),
        estimate,
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * tail,
        method="percentile",
        batch=max(1, 5_000_000 // rounds**2),  # pairs of rounds at a time: 20 MB
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Gain(float(estimate(slow_ms, fast_ms)), float(found.low), float(found.high))


def verdict(found: Gain, control: Gain) -> str:
    """Return "faster", "slower", or "no measurable gain" where noise could have done it.

    Noise could have, if the interval holds 1.0, or if the gain is smaller than what `control`, the gain of the
    baseline over itself, reaches.
    """
    if found.low <= 1 <= found.high or abs(math.log(found.ratio)) <= control.uncertainty:
        return NO_GAIN
    return "faster" if found.ratio > 1 else "slower"


def rounds_to_settle(found: Gain, control: Gain, rounds: int) -> int | None:
    """Return how many rounds would tell `found`, seen in `rounds` rounds, from noise; None where it is 1.0 exactly.

    An interval shrinks with the square root of the rounds. The estimate itself is uncertain, so this is a magnitude.
    """
    effect = abs(math.log(found.ratio))
    if effect == 0:
        return None
    towards_one = abs(math.log(found.ratio / (found.low if found.ratio > 1 else found.high)))
    return max(rounds + 1, math.ceil(rounds * (max(towards_one, control.uncertainty) / effect) ** 2))
