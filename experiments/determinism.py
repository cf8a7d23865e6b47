"""What `deterministic: true` costs: `PYTHONPATH=src:. python experiments/determinism.py [ROUNDS]`, after `dvc repro`.

Every round takes a step of each level with the setting on and one with it off, in an order drawn anew.
"""

import os
import random
import sys
from itertools import product

from gpt2_ladder import params_yaml
from gpt2_ladder.measuring import gains, turns
from gpt2_ladder.measuring.turns import Arm
from gpt2_ladder.training import data, devices
from pipeline import TRAIN_SHARD, read_environment

LEVELS = ("fp32", "bf16", "flash")  # flash without compilation, so that the setting can change from step to step


def main(rounds: int) -> None:
    """Print a table, the gain of leaving the setting off over having it on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch looks once, at the first product on a GPU
    params, environment = params_yaml.load(), read_environment()
    shape = params.shape("speed")
    device = devices.open_device(environment.device, environment.threads, params.seed, False)
    weights = turns.Weights(params.seed, params.size.learning_rate, params.optimizer, device)
    batch = next(data.Batches(data.open_shard(TRAIN_SHARD), shape.batch_size, shape.block_size))
    arms = []
    for name in LEVELS:
        level = params.levels[name]
        arms.append(Arm(name, *weights.lend(params.gpt(level)), level.precision, shape.batch_size))
    step_ms: dict[tuple[str, bool], list[float]] = {(name, on): [] for name in LEVELS for on in (True, False)}
    dice = random.Random(params.seed)
    for index in range(rounds + 2):
        for arm, on in dice.sample(list(product(arms, (True, False))), 2 * len(arms)):
            devices.set_deterministic(on)
            taken = arm.step(batch, device)
            if index >= 2:  # the first two rounds warm up
                step_ms[arm.name, on].append(taken)
    print(f"{rounds} rounds, {environment.device_name}, times as fast without as with `deterministic: true`")
    for name in LEVELS:
        print(f"| {name} | {gains.gain(step_ms[name, True], step_ms[name, False])} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
