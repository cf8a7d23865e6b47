"""Measure the gains in many fresh processes, and count how often an interval of a few holds the mean of the others.

In a checkout whose ladder has run, on a machine that does nothing else, twice, an hour or more apart:
`PYTHONPATH=src:. python -m experiments.replication run xeon-amx-tiny --processes 10`.
Then `PYTHONPATH=src:. python -m experiments.replication write` writes the tables and figures of docs/replication.md.
"""

import argparse
import itertools
import json
import math
import textwrap
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path

import altair as alt
import numpy as np

from experiments import pages
from gpt2_ladder import files
from gpt2_ladder.config import BASELINE, CONTROL, MINIMUM_ROUNDS, Strict, Switches
from gpt2_ladder.measuring import gains
from gpt2_ladder.measuring.gains import BETWEEN, Measurement, Round
from gpt2_ladder.reporting import charts, tables
from pipeline import benchmark, read_settings

FOLDER, PICTURES = Path("experiments/replication"), Path("docs/replication")
FEW, SUBSETS = 5, 2000
APART = timedelta(minutes=30)  # processes that start later belong to the next batch
READ_LEVELS = benchmark.read_levels
WARM_UP = -1  # the index of a process that fills the compile cache, and is not recorded


class Replication(Strict):
    """One file of FOLDER."""

    started: list[str]  # when each process started, UTC, ISO 8601
    measurement: Measurement

    @property
    def batches(self) -> list[int]:
        """The number of each process's batch."""
        times = [datetime.fromisoformat(start) for start in self.started]
        later = [False, *(after - before > APART for before, after in itertools.pairwise(times))]
        return list(itertools.accumulate(map(int, later)))


def run(name: str, processes: int, rounds: int, chosen: Sequence[str]) -> None:
    """Measure in `processes` more fresh processes, and save each to the file `name` when it ends."""
    path, (params, environment) = FOLDER / f"{name}.json", read_settings()
    shape, levels = params.shape("speed"), select(chosen)
    about = {"model": params.model, "batch_size": shape.batch_size, "block_size": shape.block_size}
    names = {"levels": list(levels)[:-1], "control": CONTROL, "environment": environment}
    measured, started = list[Round](), list[str]()
    if path.exists():
        earlier = Replication.model_validate_json(path.read_text())
        kept = {key: getattr(earlier.measurement, key) for key in (*about, *names)}
        if kept != {**about, **names} or len(earlier.measurement.rounds) != rounds * len(earlier.started):
            raise SystemExit(f"error: {path} has another machine, model, shape, choice of levels or number of rounds")
        measured, started = earlier.measurement.rounds, earlier.started
    first = len(started)
    for index in (WARM_UP, *range(first, first + processes)):
        start = datetime.now(UTC).isoformat(timespec="seconds")
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            new = fresh.submit(measure, index, rounds, chosen).result()
        if index == WARM_UP:
            continue
        measured, started = [*measured, *new], [*started, start]
        measurement = Measurement(estimator=BETWEEN, rounds=measured, **names, **about)
        files.write_json(path, Replication(started=started, measurement=measurement).model_dump())


def select(chosen: Sequence[str]) -> dict[str, Switches]:
    """Return the `chosen` levels of the ladder, or all, and the control."""
    levels, _ = READ_LEVELS()
    if not {*chosen} <= {*levels} or (chosen and BASELINE not in chosen):
        raise SystemExit(f"error: --levels {' '.join(chosen)}: choose {BASELINE} and others of {', '.join(levels)}")
    return {name: row for name, row in levels.items() if name in (*chosen, CONTROL) or not chosen}


def measure(index: int, rounds: int, chosen: Sequence[str]) -> list[Round]:
    """Return the rounds of process number `index`: this process."""
    micro_batch = READ_LEVELS()[1]
    benchmark.read_levels = lambda: (select(chosen), micro_batch)
    return benchmark.measure(index + 2, index + 4, rounds, math.inf)[0]  # neither the first nor the last of them


def holds(interval: tuple[float, float], others: Sequence[float]) -> bool:
    """Return whether `interval` of a ratio holds the geometric mean of `others`."""
    return bool(interval[0] <= math.exp(np.log(others).mean()) <= interval[1])


def coverage(estimates: Sequence[float]) -> tuple[float, float]:
    """Return how often an interval of FEW processes holds the mean of the others: as it is, and widened for theirs."""
    generator, hits = np.random.default_rng(0), np.zeros(2)
    for _ in range(SUBSETS):
        shuffled = generator.permutation(estimates)
        hits += hold(shuffled[:FEW], shuffled[FEW:])
    return tuple(hits / SUBSETS)


def coverage_across(batches: Sequence[Sequence[float]]) -> float:
    """Return how often a widened interval of FEW processes of one batch holds the mean of another batch."""
    pairs = list(itertools.permutations(batches, 2))
    hits = [hold(few, other)[1] for one, other in pairs for few in itertools.combinations(one, FEW)]
    return float(np.mean(hits)) if hits else math.nan


def hold(few: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """Return whether the interval of `few` processes holds the mean of `others`: as it is, and widened for theirs."""
    gain, wider = gains.gain_between(few), math.sqrt(1 + len(few) / len(others))
    ends = [[gain.ratio * (end / gain.ratio) ** factor for end in (gain.low, gain.high)] for factor in (1, wider)]
    return np.array([holds((low, high), others) for low, high in ends])


def single_coverage(measurement: Measurement, level: str, over: str, estimates: Sequence[float]) -> float:
    """Return how often the interval of one process holds the mean of the others."""
    hits = []
    for index, process in enumerate(dict.fromkeys(round_.process for round_ in measurement.rounds)):
        own = [round_ for round_ in measurement.rounds if round_.process == process]
        gain = measurement.model_copy(update={"rounds": own}).gain(level, over)
        hits.append(holds((gain.low, gain.high), [*estimates[:index], *estimates[index + 1 :]]))
    return float(np.mean(hits))


def comparisons(measurement: Measurement) -> list[tuple[str, str]]:
    """Return what is compared: each level and the control with the baseline, and with the level before."""
    levels = measurement.levels
    later = [(level, levels[0]) for level in (*levels[1:], measurement.control)]
    return later + [(level, previous) for previous, level in itertools.pairwise(levels) if previous != levels[0]]


def table(replication: Replication) -> str:
    """Return the table of one machine and model."""
    measurement, batches = replication.measurement, np.array(replication.batches)
    rows = list[dict[str, str]]()
    for level, over in comparisons(measurement):
        estimates = np.array(measurement.estimates(level, over))
        parts = [estimates[batches == batch] for batch in sorted({*batches})]
        apart = math.exp(np.log(parts[-1]).mean() - np.log(parts[0]).mean()) if len(parts) > 1 else math.nan
        five, widened = coverage(estimates)
        row = {
            "gain of": f"`{level}`",
            "over": f"`{over}`",
            "mean of all": str(gains.gain_between(estimates)),
            "deviation between processes": f"{np.log(estimates).std(ddof=1):.1%}",
            "batch 2 / batch 1": f"{apart:.3f}",
            f"held by {FEW}": f"{five:.2f}",
            "widened": f"{widened:.2f}",
            "other batch": f"{coverage_across(parts):.2f}",
            "held by 1": f"{single_coverage(measurement, level, over, estimates):.2f}",
        }
        rows.append(row)
    return tables.markdown_table([list(rows[0]), *(list(row.values()) for row in rows)], text_columns=2)


def figure(replication: Replication) -> alt.FacetChart:
    """Draw the gain over the baseline of each process and level, with its interval of FEW processes in a row."""
    measurement, batches, rows = replication.measurement, replication.batches, []
    for level in (*measurement.levels[1:], measurement.control):
        estimates = measurement.estimates(level, measurement.levels[0])
        mean = math.exp(np.log(estimates).mean())
        rows += [
            {
                "level": level,
                "process": index,
                "batch": f"batch {batches[index] + 1}",
                "percent": 100 * (estimate / mean - 1),
            }
            for index, estimate in enumerate(estimates)
        ]
        for first in range(0, len(estimates), FEW):
            gain = gains.gain_between(estimates[first : first + FEW])
            rows.append(
                {
                    "level": level,
                    "middle": first + (FEW - 1) / 2,
                    "center": 100 * (gain.ratio / mean - 1),
                    "low": 100 * (gain.low / mean - 1),
                    "high": 100 * (gain.high / mean - 1),
                }
            )
    base = alt.Chart().encode(alt.X("middle:Q"))
    title = "gain over the mean of all, in %"
    layers = [
        base.mark_bar(color="#dddddd", width=28).encode(alt.Y("low:Q", title=title), alt.Y2("high:Q")),
        base.mark_tick(color="black", width=28, orient="horizontal").encode(alt.Y("center:Q")),
        alt.Chart()
        .mark_point(filled=True, size=25)
        .encode(
            alt.X("process:Q", title="process"),
            alt.Y("percent:Q"),
            alt.Color(
                "batch:N",
                legend=alt.Legend(title=None, orient="bottom"),
                scale=alt.Scale(range=[charts.COLORS["baseline"], charts.COLORS["slower"]]),
            ),
        ),
    ]
    order = [*measurement.levels[1:], measurement.control]
    return (
        alt.layer(*layers, data=alt.Data(values=rows))
        .properties(width=170, height=110)
        .facet(alt.Facet("level:N", title=None, sort=order), columns=4)
        .resolve_scale(y="independent")
    )


def write() -> None:
    """Write the tables and figures of all files into docs/replication.md."""
    parts = []
    for path in sorted(FOLDER.glob("*.json")):
        replication = Replication.model_validate(json.loads(path.read_text()))
        run, machine = replication.measurement, replication.measurement.environment
        rounds = len(run.rounds) // run.processes
        about = f"{machine.device_name}, {machine.threads} threads, torch {machine.torch}"
        count = f"{run.processes} processes of {rounds} rounds in {max(replication.batches) + 1} batches"
        parts.append(
            textwrap.fill(
                f"`model: {run.model}` on {about}, {run.batch_size} x {run.block_size} tokens a step, {count}:", 120
            )
        )
        parts += [table(replication), f"![gains of each process](replication/{path.stem}.svg)"]
        files.write(PICTURES / f"{path.stem}.svg", charts.svg(figure(replication)))
    pages.put(pages.REPLICATION, "replication", "\n\n".join(parts))


def main() -> None:
    """Measure or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write")
    measuring = commands.add_parser("run")
    measuring.add_argument("name")
    measuring.add_argument("--processes", type=int, default=10)
    measuring.add_argument("--rounds", type=int, default=MINIMUM_ROUNDS)
    measuring.add_argument("--levels", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.command == "write":
        write()
    else:
        run(arguments.name, arguments.processes, arguments.rounds, arguments.levels)


if __name__ == "__main__":
    main()
