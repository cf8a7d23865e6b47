"""Follow the steps of a training: show and record them, validate, save checkpoints, and stop at a signal."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from gpt2_ladder import ledger
from gpt2_ladder.config import UserError
from gpt2_ladder.running import progress
from gpt2_ladder.running.checkpoints import Checkpoints, Course
from gpt2_ladder.running.job import Job
from gpt2_ladder.running.tracking import Tracker
from gpt2_ladder.training import ranks
from gpt2_ladder.training.metrics import Step
from gpt2_ladder.training.precisions import PRECISIONS

MOST_SKIPPED = 8  # steps in a row; each halves the scale of the loss
FIRST_STEPS = 20  # after these, a training with a time limit knows how many steps fit into it


def follow(
    steps: Iterable[Step],
    tracker: Tracker,
    job: Job,
    course: Course | None = None,
    validate: Callable[[int, int], None] = lambda step, micro_batch: None,
    resumed: int = 0,
    saved: Checkpoints | None = None,
) -> list[Step]:
    """Show and record all `steps`, validate, save checkpoints to `saved`, and return the steps.

    `validate` adds the loss after a number of steps to `course`; it gets this number and the micro-batch (0: the
    first). The first `resumed` steps come from a checkpoint. The weights are read only where `settle` was true. Raise
    UserError if a loss or a gradient (in fp16: MOST_SKIPPED in a row) is not finite, or at a signal; checkpoints stay.
    """
    course, every = course or Course(job.shape.steps), job.recipe.eval_every
    done, ends = list[Step](), [time.perf_counter()]
    if every and 0 not in course.validations:
        validate(0, 0)
    allowed = MOST_SKIPPED if PRECISIONS[job.switches.precision].scaled else 1
    seconds_a_step = (time.perf_counter() - ends[0]) / every if every else 0.0  # for validation
    compiling = "compile" if job.switches.compile else "steps"  # the first step of this process compiles
    with ledger.phase(compiling), catch_signals(saved is not None) as caught:
        for step in progress.show(steps, job.name, lambda: course.steps):
            tracker.log(step)
            done.append(step)
            course.skipped += not math.isfinite(step.grad_norm)
            recent = [math.isfinite(each.grad_norm) for each in done[-allowed:]]
            if not math.isfinite(step.loss) or recent == allowed * [False]:
                more = f" in float16 ({course.skipped} steps skipped); use precision: fp32, or" if allowed > 1 else ";"
                raise UserError(
                    f"{job.name}: at step {step.step} the loss is {step.loss} and the gradient's norm "
                    f"{step.grad_norm}{more} lower models.*.learning_rate in params.yaml{_last_checkpoint(saved)}"
                )
            settled = len(done) == course.settled
            if every and settled and (len(done) % every == 0 or len(done) == course.steps):
                validate(len(done), step.micro_batch)
            if len(done) in course.validations:
                tracker.log_validation(len(done), course.validations[len(done)])
            if len(done) <= resumed:
                continue
            ends.append(time.perf_counter())
            ledger.enter("steps")
            if course.steps is None and settled and len(ends) > FIRST_STEPS:
                course.steps = _count_steps(job, done[:resumed], ends, seconds_a_step)
            if saved:
                course.signals = [name for names in ranks.gather(caught) for name in names]  # the same on all ranks
                if settled and (course.signals or len(done) % saved.every == 0):
                    if ranks.rank() == 0:
                        saved.save(done)
                    ranks.gather(None)  # wait until the checkpoint is saved
                if settled and course.signals and len(done) != course.steps:
                    stopped = f"stopped by {course.signals[0]} after step {step.step}"
                    raise UserError(f"{job.name}: {stopped}{_last_checkpoint(saved)}")
    return done


def settle(steps: int, job: Job, course: Course, saved: Checkpoints | None, resumed: int) -> bool:
    """Return whether something uses the result of `steps` steps, and note it in `course`."""
    changing = (job.recipe.schedule, job.recipe.lr_warmup_steps) != ("constant", 0)  # skipped steps do not advance it
    each = changing and PRECISIONS[job.switches.precision].scaled
    every = [job.recipe.eval_every, saved and saved.every, each and 1]
    used = steps == course.steps or any(number and steps % number == 0 for number in every)
    if used or course.signals or (course.steps is None and steps == resumed + FIRST_STEPS):
        course.settled = steps
    return course.settled == steps


def _count_steps(job: Job, earlier: Sequence[Step], ends: Sequence[float], seconds_more: float) -> int:
    """Return how many steps fit into the minutes of `job`; rank 0 decides. Raise UserError if the warm-up needs more.

    `earlier` steps come from a checkpoint. `ends` has the times of the start and of the end of each later step. A step
    needs `seconds_more`, because of validation.
    """
    minutes, pace = job.recipe.minutes or 0.0, statistics.median(b - a for a, b in pairwise(ends)) + seconds_more
    left = 60 * minutes - sum(step.step_ms for step in earlier) / 1000 - (ends[-1] - ends[0])
    count = len(earlier) + len(ends) - 1 + max(0, int(left / pace))
    count = ranks.gather(min(count, job.shape.steps))[0]
    if count <= (warmup := job.recipe.lr_warmup_steps):
        fix = "set more minutes or fewer warm-up steps"
        raise UserError(f"recipe.lr_warmup_steps = {warmup}, but {count} steps fit into {minutes:g} minutes; {fix}")
    print(f"{job.name}: {count:,} steps fit into {minutes:g} minutes", flush=True)
    return count


@contextmanager
def catch_signals(enabled: bool) -> Iterator[list[str]]:
    """Collect the names of signals (SIGTERM, Ctrl-C), so that the step can finish. A second signal ends the process."""
    caught: list[str] = []

    def note(number: int, _: object) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, handlers[number])

    handlers: dict[int, Any] = {}
    for kind in (signal.SIGTERM, signal.SIGINT) if enabled else ():
        handlers[kind] = signal.signal(kind, note)
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _last_checkpoint(saved: Checkpoints | None) -> str:
    newest = saved.newest() if saved else None
    return f"; the next run resumes from the last good checkpoint, {newest}" if newest else ""
