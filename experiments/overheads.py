"""Measure tracking, loading, starting and checking: `PYTHONPATH=src:. python experiments/overheads.py`.

Run it after `dvc repro` on an idle machine. It changes nothing that DVC tracks.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from experiments import pages
from gpt2_ladder import config, params_yaml
from gpt2_ladder.running import progress, tracking
from gpt2_ladder.training import data
from gpt2_ladder.training.metrics import Step
from pipeline import ENCODER_JSON, ENVIRONMENT, PROBE, RESULTS, TRAIN_SHARD, VAL_SHARD

STEPS, STEP_MS = 1000, 100.0
SHARDS = [path for shard in (TRAIN_SHARD, VAL_SHARD) for path in (shard, data.sidecar_path(shard))]
NEEDED = [Path("params.yaml"), ENVIRONMENT, PROBE, ENCODER_JSON, *SHARDS]


def recording_ms() -> list[float]:
    """Return the milliseconds of recording each of STEPS steps: CSV, W&B offline and the progress line."""
    steps = [Step(index, 9.0, STEP_MS, 5120.0, 1.0, 2, 0.0) for index in range(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder}
        run = tracking.start_run({}, name="overheads")
        times = []
        with tracking.Tracker(Path(folder) / "steps.csv", run, 1) as tracker:
            start = time.perf_counter()
            for step in progress.show(steps, "overheads", lambda: STEPS):
                tracker.log(step)
                now = time.perf_counter()
                times.append((now - start) * 1000)
                start = now
        return times


def loading_ms(shape: config.Shape) -> list[float]:
    """Return the milliseconds of loading each of STEPS batches."""
    batches = data.Batches(data.open_shard(TRAIN_SHARD), shape.batch_size, shape.block_size)
    times = []
    for _ in islice(range(STEPS), STEPS):
        start = time.perf_counter()
        next(batches)
        times.append((time.perf_counter() - start) * 1000)
    return times


def start_seconds() -> float:
    """Return the seconds from a training stage's command to the start of its first step, in a copy of the workspace."""
    with tempfile.TemporaryDirectory() as folder:
        for path in NEEDED:
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, Path(folder) / path)
        here = Path.cwd()
        variables = {**os.environ, "PYTHONPATH": f"{here / 'src'}:{here}", "WANDB_MODE": "offline"}
        variables.pop("WANDB_DIR", None)
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "pipeline.train", "fp32"],
            **{"cwd": folder, "env": variables, "stdout": subprocess.PIPE, "text": True},
        ) as stage:
            while "step   0" not in (line := stage.stdout.readline()):
                if not line:
                    raise SystemExit("error: the stage ended before its first step")
            seconds = time.perf_counter() - start
            stage.stdout.readline(), stage.stdout.readline()  # after step 2 is shown, steps 0 and 1 are in the file
            stage.kill()
        with (Path(folder) / RESULTS / "levels" / "fp32" / "steps.csv").open() as file:
            _, second, *_ = csv.DictReader(file)
            return seconds - float(second["seconds"])  # step 0 is shown when step 1 has been launched: on a CPU, taken


def command_seconds(command: list[str], stages: int = 0) -> float:
    """Return how long `command` takes; exit if it fails or runs more than `stages` DVC stages."""
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if result.returncode or result.stdout.count("Running stage") > stages:
        raise SystemExit(f"error: {' '.join(command)}: {result.stdout}{result.stderr}")
    return seconds


def main() -> None:
    """Measure everything and write the table into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="repeats of measurements that start a process")
    repeats = parser.parse_args().repeats
    check = [sys.executable, "-c", "from gpt2_ladder import params_yaml; params_yaml.load()"]
    again = ["dvc", "repro"]
    command_seconds(again, stages=99)  # afterwards `dvc repro` runs the environment stage only

    def repeat(measure: Callable[[], float]) -> list[float]:
        return [measure() for _ in range(repeats)]

    measured = [
        ("recording a step: CSV, W&B offline, progress", "1 ms", "ms", recording_ms()),
        ("the next batch", "a step", "ms", loading_ms(params_yaml.load().shape("speed"))),
        ("a training's command to its first step, GPT-2 124M", "4 s", "s", repeat(start_seconds)),
        ("checking params.yaml, Python's start included", "0.5 s", "s", repeat(lambda: command_seconds(check))),
        ("`dvc repro` with nothing to do", "2 s", "s", repeat(lambda: command_seconds(again, stages=1))),
    ]
    rows = [
        "| what | limit | median | 95 % below | maximum | repeats |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for what, limit, unit, times in measured:
        quantile = sorted(times)[int(0.95 * (len(times) - 1))]
        cells = [f"{value:.3g} {unit}" for value in (statistics.median(times), quantile, max(times))]
        rows.append(f"| {what} | {limit} | {' | '.join(cells)} | {len(times)} |")
    rows += ["", pages.conditions()]
    print("\n".join(rows))
    pages.put(pages.PERFORMANCE, "overheads", "\n".join(rows))


if __name__ == "__main__":
    main()
