"""Measure the cost of `deterministic: true`: `PYTHONPATH=src:. python experiments/determinism.py [ROUNDS]`.

Run `dvc repro` first. Every round takes a step of each level with the setting on and one with it off, in random order.
"""

import os
import random
import sys
from itertools import product

from gpt2_ladder.measuring import gains, turns
from gpt2_ladder.training import data, devices
from pipeline import TRAIN_SHARD, read_settings

LEVELS = ("fp32", "bf16", "flash")  # flash without compilation, so that the setting can change from step to step


def main(rounds: int) -> None:
    """Print a table with the gain of the setting off over the setting on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product on a GPU
    params, environment = read_settings()
    shape = params.shape("speed")
    device = devices.open_device(environment.device, environment.threads, params.seed, False)
    batch = next(data.Batches(data.open_shard(TRAIN_SHARD), shape.batch_size, shape.block_size))
    arms = turns.build_arms(params, {name: params.levels[name] for name in LEVELS}, device, shape.batch_size)
    step_ms: dict[tuple[str, bool], list[float]] = {(name, on): [] for name in LEVELS for on in (True, False)}
    generator = random.Random(params.seed)
    for index in range(rounds + 2):
        for arm, on in generator.sample(list(product(arms, (True, False))), 2 * len(arms)):
            devices.set_deterministic(on)
            ms = arm.step(batch, device)
            if index >= 2:  # the first two rounds are the warm-up
                step_ms[arm.name, on].append(ms)
    print(f"{rounds} rounds, {environment.device_name}, times as fast without as with `deterministic: true`")
    for name in LEVELS:
        print(f"| {name} | {gains.gain(step_ms[name, True], step_ms[name, False])} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
