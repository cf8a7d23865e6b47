"""Train the quality levels with several seeds: `PYTHONPATH=src:. python -m experiments.quality --seeds 10`.

Run `dvc repro parity` first: the first seed is the climb's own, with the losses of its trainings. Each other seed draws
new weights and, as with `data.shuffle: true`, a new order of the text, the same for all levels. The losses are written
after each seed, so an interrupted run continues. `make quality` runs all of this, and updates the report.
"""

import gc
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gpt2_ladder import files
from gpt2_ladder.config import Environment, UserError
from gpt2_ladder.params import Params
from gpt2_ladder.reporting import tables
from gpt2_ladder.running import run as training
from pipeline import QUALITY, TRAINING_INPUTS, Parser, read_json, read_quality, read_settings, run
from pipeline.train import make_job


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
    print(tables.markdown_table(tables.seeds_table(losses), text_columns=1))


def train(params: Params, environment: Environment, name: str) -> float:
    """Train the level `name` in a temporary folder, and return its last loss in nats."""
    with TemporaryDirectory() as folder:
        job = replace(make_job(params, name), name=f"{name}, seed {params.seed}", folder=Path(folder))
        training.run(job, params, environment, training.Inputs(*TRAINING_INPUTS), job.shape.batch_size)
        gc.collect()  # reference cycles could keep the network in memory
        return float(read_json(job.folder / "metrics.json")["loss_last"])


if __name__ == "__main__":
    run(main)
