"""The record of one training step, and pure functions from such records to the reported numbers."""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """The record of one training step."""

    step: int  # from 0
    loss: float  # mean cross-entropy of the batch in nats, before the update
    step_ms: float  # from the end of the step before, or from its own start after a pause, to its end
    tokens_per_second: float  # of all ranks together
    grad_norm: float  # Euclidean norm of the whole gradient, before clipping; not finite: fp16 skipped the step
    micro_batch: int  # rows that went through the network at a time, on each device
    seconds: float  # from the loop's start in this process to the end of the step


STEP_FIELDS = tuple(field.name for field in fields(Step))
HEADER = ",".join(STEP_FIELDS) + "\n"  # the first line of steps.csv

# The measured keys of metrics.json; all are null if the level was skipped.
MEASURED = (
    *("parameters", "loss_first", "loss_last", "skipped_steps", "val_loss", "bits_per_byte", "epochs_seen"),
    *("step_ms", "tokens_per_second", "goodput", "compile_seconds", "compile_cache"),
    *("peak_memory_mib", "peak_memory_reserved_mib", "micro_batch", "attention_kernel", "float32_matmul_precision"),
)


def read_losses(steps_csv: Path) -> list[float]:
    """Return the losses in a training's steps.csv; none if the file does not exist."""
    rows = csv.DictReader(steps_csv.read_text().splitlines()) if steps_csv.exists() else ()
    return [float(row["loss"]) for row in rows]


def count_before_skip(steps_csv: Path) -> int:
    """Return how many losses of a training come before the effect of its first skipped step."""
    rows = csv.DictReader(steps_csv.read_text().splitlines())
    return [*(math.isfinite(float(row["grad_norm"])) for row in rows), False].index(False) + 1


def tokens_per_second(tokens: int, step_ms: float) -> float:
    """Return the tokens per second of a step with `tokens` tokens that took `step_ms` milliseconds."""
    return tokens / (step_ms / 1000)


def goodput(steps: Sequence[Step], tokens_per_step: int) -> float | None:
    """Return the tokens per second from the end of the first of `steps` to the end of the last, all pauses included.

    It is None for a single step.
    """
    if len(steps) < 2:
        return None
    return tokens_per_step * (len(steps) - 1) / (steps[-1].seconds - steps[0].seconds)


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Convert a mean `loss` in nats over `tokens` tokens, which encode `text_bytes` bytes, into bits per byte.

    Bits per byte can be compared between networks with different vocabularies.
    """
    return loss / math.log(2) * tokens / text_bytes


def median_step_ms(steps: Sequence[Step], warmup_steps: int) -> float:
    """Return the median time of a step in milliseconds, without the first `warmup_steps`."""
    return statistics.median(step.step_ms for step in steps[warmup_steps:])


def compile_seconds(steps: Sequence[Step], warmup_steps: int) -> float:
    """Return how many seconds longer the first step took, which includes compilation, than the median step."""
    return max(0.0, steps[0].step_ms - median_step_ms(steps, warmup_steps)) / 1000
