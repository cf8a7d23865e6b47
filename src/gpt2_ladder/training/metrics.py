"""One training step's record, and pure functions from many of them to the numbers that are reported."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Step:
    """What one step of training showed.

    Attributes:
        step: index, from 0.
        loss: mean cross-entropy in nats of this step's batch, before its update.
        step_ms: milliseconds for zero_grad, forward, loss, backward and optimizer step, the device synchronized.
        tokens_per_second: the batch's tokens over step_ms, those of all ranks together.
        grad_norm: Euclidean norm of the whole gradient, before any clipping.
        micro_batch: how many rows of the batch went through the network at a time, at most, on each device.
    """

    step: int
    loss: float
    step_ms: float
    tokens_per_second: float
    grad_norm: float
    micro_batch: int


STEP_FIELDS = tuple(field.name for field in fields(Step))
HEADER = ",".join(STEP_FIELDS) + "\n"  # of steps.csv

# What metrics.json holds of a trained level, besides status, reason and note; all null where the level was skipped.
MEASURED = (
    "parameters",
    "loss_first",
    "loss_last",
    "val_loss",
    "bits_per_byte",
    "epochs_seen",
    "step_ms",
    "tokens_per_second",
    "compile_seconds",
    "compile_cache",
    "peak_memory_mib",
    "micro_batch",
    "attention_kernel",
    "float32_matmul_precision",
)


def tokens_per_second(tokens: int, step_ms: float) -> float:
    """Return the rate at which `tokens` went by in `step_ms` milliseconds."""
    return tokens / (step_ms / 1000)


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Return a mean `loss` in nats over `tokens` tokens as bits for each byte of the text that they stand for.

    Networks with other vocabularies can be compared by it, which cut the same text into more or fewer tokens.
    """
    return loss / math.log(2) * tokens / text_bytes


def median_step_ms(steps: Sequence[Step], warmup_steps: int) -> float:
    """Return the median time of a step in milliseconds, the first `warmup_steps` left out."""
    return statistics.median(step.step_ms for step in steps[warmup_steps:])


def compile_seconds(steps: Sequence[Step], warmup_steps: int) -> float:
    """Return how much longer than the median step the first one took, in seconds: compilation happens inside it."""
    return max(0.0, steps[0].step_ms - median_step_ms(steps, warmup_steps)) / 1000
