"""Check that the network can learn: train on one batch until it is memorized. Every level depends on this stage."""

import math
from itertools import repeat

from gpt2_ladder import files
from gpt2_ladder.config import Recipe, UserError
from gpt2_ladder.running.following import follow
from gpt2_ladder.running.job import Job
from gpt2_ladder.running.run import build_and_start_wandb, describe
from gpt2_ladder.running.tracking import Tracker
from gpt2_ladder.training import capabilities, data, loop
from pipeline import RESULTS, TRAIN_SHARD, read_settings, run

LEVEL = "untied"
FIRST_LOSS_TOLERANCE = 0.3  # PyTorch's default init is a little worse than uniform: 10.98, and ln(50257) = 10.825


def main() -> None:
    params, environment = read_settings()
    capabilities.check_machine(params.machine, params.rehearsal, environment)
    level, shape = params.levels[LEVEL], params.quality
    job = Job("overfit", "overfit", level, shape, Recipe(), 1, RESULTS / "overfit")
    settings = describe(job, params, environment)
    built, wandb_run = build_and_start_wandb(job, params, environment, shape.batch_size, settings)
    batch = next(data.Batches(data.open_shard(TRAIN_SHARD), shape.batch_size, shape.block_size))
    batches = repeat(batch, shape.steps)
    with Tracker(job.folder / "steps.csv", wandb_run, job.tokens_per_step) as tracker:
        parts = built.model, built.optimizer, batches, built.autocast, built.device
        steps = loop.train(*parts, shape.batch_size, scaler=built.scaler)
        losses = [step.loss for step in follow(steps, tracker, job)]
        result = {"steps": len(losses), "loss_first": losses[0], "loss_last": losses[-1]}
        tracker.summarize(result)
        check(losses[0], losses[-1], level.vocab_size, params.size.overfit_loss)
    files.write_json(RESULTS / "overfit.json", result)


def check(loss_first: float, loss_last: float, vocab_size: int, bound: float) -> None:
    """Raise UserError if the first loss is not that of a uniform guess, or if the last loss is over `bound` nats."""
    uniform = math.log(vocab_size)
    if not abs(loss_first - uniform) <= FIRST_LOSS_TOLERANCE:  # written so that NaN fails too
        wrong = f"not within {FIRST_LOSS_TOLERANCE} of ln(vocab_size) = {uniform:.4f}"
        fix = "fix the initialization or the loss in src/gpt2_ladder/model.py"
        raise UserError(f"overfit: the first loss is {loss_first:.4f}, {wrong}: {fix}")
    if not loss_last <= bound:
        fix = "fix src/gpt2_ladder/model.py, or change models.*.learning_rate or overfit_loss in params.yaml"
        raise UserError(f"overfit: the last loss is {loss_last:.4f}, over the bound {bound}: {fix}")


if __name__ == "__main__":
    run(main)
