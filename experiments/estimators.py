"""Compare estimators of a gain where the true gain is 1.0: `python experiments/estimators.py RUN.json ...`.

The runs have arms that compute the same: the baseline, its control, and tf32 in earlier runs on a CPU. Every pair of
them should give 1.0; the table shows the error of each estimator over whole runs and random subsets of SMALL rounds.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

Times = np.ndarray  # (..., rounds), milliseconds
SUBSETS, SMALL = 200, 8


def trimmed(values: Times, share: float = 0.25) -> Times:
    """Return the mean over the last axis without the lowest and the highest `share`."""
    ordered, cut = np.sort(values, axis=-1), int(values.shape[-1] * share)
    return ordered[..., cut : values.shape[-1] - cut].mean(axis=-1)


def hodges_lehmann(values: Times) -> Times:
    """Return the median over the last axis of the means of all pairs."""
    i, j = np.triu_indices(values.shape[-1])
    return np.median((values[..., i] + values[..., j]) / 2, axis=-1)


ESTIMATORS: dict[str, Callable[[Times, Times], Times]] = {
    "median of the per-round ratios": lambda a, b: np.median(a / b, axis=-1),
    "geometric mean of the per-round ratios": lambda a, b: np.exp(np.log(a / b).mean(axis=-1)),
    "trimmed mean of the per-round log ratios": lambda a, b: np.exp(trimmed(np.log(a / b))),
    "Hodges-Lehmann of the per-round log ratios": lambda a, b: np.exp(hodges_lehmann(np.log(a / b))),
    "ratio of medians": lambda a, b: np.median(a, axis=-1) / np.median(b, axis=-1),
    "ratio of means": lambda a, b: a.mean(axis=-1) / b.mean(axis=-1),
    "ratio of 25 % quantiles": lambda a, b: np.quantile(a, 0.25, axis=-1) / np.quantile(b, 0.25, axis=-1),
    "ratio of minima": lambda a, b: a.min(axis=-1) / b.min(axis=-1),
}


def main(*paths: str) -> None:
    """Print the table."""
    generator, same = np.random.default_rng(0), []
    for path in paths:
        run = json.loads(Path(path).read_text())
        arms = [
            run["levels"][0],
            run["control"],
            *(["tf32"] if "tf32" in run["levels"] and run["environment"]["device"] == "cpu" else []),
        ]
        times = {arm: np.array([step["step_ms"][arm] for step in run["rounds"]]) for arm in arms}
        same += [(times[a], times[b]) for a, b in itertools.combinations(arms, 2)]
    print(f"{len(same)} pairs of equal arms in {len(paths)} runs, {len(same[0][0])} rounds in the first\n")
    print(f"| estimator | error, root mean square | largest error | in {SMALL} rounds, root mean square |")
    print("|---|---:|---:|---:|")
    rows = []
    for name, estimate in ESTIMATORS.items():
        whole = np.array([float(estimate(a, b)) for a, b in same]) - 1
        small = []
        for a, b in same:
            chosen = np.array([generator.choice(len(a), SMALL, replace=False) for _ in range(SUBSETS)])
            small.append(estimate(a[chosen], b[chosen]) - 1)
        rows.append((np.sqrt((whole**2).mean()), np.abs(whole).max(), np.sqrt((np.array(small) ** 2).mean()), name))
    for rms, worst, small_rms, name in sorted(rows):
        print(f"| {name} | {rms:.2%} | {worst:.2%} | {small_rms:.2%} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
