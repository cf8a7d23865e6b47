"""Train the quality levels with several seeds: `PYTHONPATH=src:. python -m experiments.quality --seeds 10`.

Run `dvc repro parity` first: the first seed is the climb's own, with the losses of its trainings. Each other seed draws
new weights and, as with `data.shuffle: true`, a new order of the text, the same for all levels. The losses are written
after each seed, so an interrupted run continues. `make quality` runs all of this.
"""

import gc
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

from scipy.stats import t as student_t

from gpt2_ladder import files
from gpt2_ladder.config import Environment, UserError
from gpt2_ladder.params import Params
from gpt2_ladder.reporting.tables import MISSING, Table, markdown_table
from gpt2_ladder.running import run as training
from pipeline import RESULTS, TRAINING_INPUTS, Parser, read_metrics, read_settings, run
from pipeline.train import make_job

QUALITY = RESULTS / "quality.json"


def main(*arguments: str) -> None:
    """Train with the seeds that QUALITY lacks, and print the table of all seeds."""
    parser = Parser(prog="python -m experiments.quality", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="number of seeds, by default 10")
    count = parser.parse_args(arguments).seeds
    if count < 2:
        raise UserError(f"--seeds {count}: must be 2 or more, because one draw has no interval")
    params, environment = read_settings()
    losses, text = read_quality(params), params.data.model_copy(update={"shuffle": True})
    os.environ["WANDB_MODE"] = "disabled"
    for seed in range(params.seed, params.seed + count):
        if str(seed) not in losses:
            own = params.model_copy(update={"seed": seed, "data": text, "checkpoint_every": None})
            losses[str(seed)] = {name: train(own, environment, name) for name in losses[str(params.seed)]}
            files.write_json(QUALITY, losses)
        row = ", ".join(f"{name} {loss:.4f}" for name, loss in losses[str(seed)].items())
        print(f"seed {seed}: last loss of {row}", flush=True)
    print(markdown_table(seeds_table(losses), text_columns=1))


def train(params: Params, environment: Environment, name: str) -> float:
    """Train the level `name` in a temporary folder, and return its last loss in nats."""
    with TemporaryDirectory() as folder:
        job = replace(make_job(params, name), name=f"{name}, seed {params.seed}", folder=Path(folder))
        training.run(job, params, environment, training.Inputs(*TRAINING_INPUTS), job.shape.batch_size)
        gc.collect()  # reference cycles could keep the network in memory
        return float(files.read_json(job.folder / "metrics.json")["loss_last"])


def read_quality(params: Params) -> dict[str, dict[str, float]]:
    """Return the last losses of the trained quality levels in nats, by seed and level: the climb's and QUALITY's.

    QUALITY counts only if it has the climb's losses to the last digit: other settings, code or texts change them.
    """
    names = [name for name, level in params.levels.items() if level.group == "quality"]
    climb = {str(params.seed): {name: loss for name in names if (loss := read_metrics(name)["loss_last"]) is not None}}
    saved = files.read_json(QUALITY) if QUALITY.exists() else {}
    return saved if climb.items() <= saved.items() else climb


def seeds_table(losses: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the mean and deviation of `losses`, by seed and level: one row per level and per pair of levels.

    Differences are paired by seed. One is larger than chance if its 95 % interval (Student's t) does not contain 0.
    """
    columns = {name: [row[name] for row in losses.values()] for name in next(iter(losses.values()))}
    factor = float(student_t.ppf(0.975, len(losses) - 1)) / math.sqrt(len(losses))
    rows = [["level or difference", "mean loss", "standard deviation", "95 % interval", "larger than chance"]]
    for name, values in columns.items():
        rows.append([name, f"{statistics.mean(values):.4f}", f"{statistics.stdev(values):.4f}", MISSING, MISSING])
    for first, second in combinations(columns, 2):
        apart = [a - b for a, b in zip(columns[first], columns[second], strict=True)]
        mean, deviation = statistics.mean(apart), statistics.stdev(apart)
        half, cells = factor * deviation, [f"{first} - {second}", f"{mean:+.4f}", f"{deviation:.4f}"]
        rows.append([*cells, f"[{mean - half:+.4f}, {mean + half:+.4f}]", "yes" if abs(mean) > half else "no"])
    return rows


if __name__ == "__main__":
    run(main)
