"""Prove that the network can learn at all: the first batch of the text, again and again, until it is known by heart.

Every level's training depends on the result, so nothing trains on a broken network.
"""

import math
from itertools import repeat

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.training import data, devices, loop, runtime
from pipeline import RESULTS, TRAIN_SHARD, read_environment, run, trainer, write_json

LEVEL = "untied"
FIRST_LOSS_TOLERANCE = 0.3  # PyTorch's default init is a little worse than uniform: 10.98 is usual, ln(50257) = 10.825


def main() -> None:
    params, environment = params_yaml.load(), read_environment()
    devices.check_machine(params.machine, params.rehearsal, environment)
    level, shape = params.levels[LEVEL], params.quality
    device, model, optimizer = trainer.build(params, level, environment)
    batch = next(data.Batches(data.open_shard(TRAIN_SHARD), shape.batch_size, shape.block_size))
    autocast = runtime.set_precision(level.precision, device)
    csv = RESULTS / "overfit" / "steps.csv"
    described = trainer.describe("overfit", params, level, shape, environment)
    with trainer.open_tracker("overfit", described, csv) as tracker:
        steps = loop.train(model, optimizer, repeat(batch, shape.steps), autocast, device, shape.batch_size)
        losses = [step.loss for step in trainer.follow(steps, tracker, "overfit", shape.steps)]
        result = {"steps": len(losses), "loss_first": losses[0], "loss_last": losses[-1]}
        tracker.summarize(result)
        check(losses[0], losses[-1], level.vocab_size, params.size.overfit_loss)
    write_json(RESULTS / "overfit.json", result)


def check(loss_first: float, loss_last: float, vocab_size: int, bound: float) -> None:
    """Raise UserError unless the loss began near that of a uniform guess and ended at most at `bound`, both in nats."""
    uniform = math.log(vocab_size)
    if not abs(loss_first - uniform) <= FIRST_LOSS_TOLERANCE:  # written so that NaN fails too
        raise UserError(
            f"overfit: the loss at init is {loss_first:.4f}, not within {FIRST_LOSS_TOLERANCE} of "
            f"ln(vocab_size) = {uniform:.4f}: initialization or loss is broken"
        )
    if not loss_last <= bound:
        raise UserError(
            f"overfit: one batch still has a loss of {loss_last:.4f} at the last step, over the bound {bound} "
            "(models.*.overfit_loss): the network does not learn"
        )


if __name__ == "__main__":
    run(main)
