"""Speed must not cost quality: every speed level's loss curve against the baseline's, step by step.

All speed levels start from the same weights and see the same batches, so their losses differ by rounding alone. How
much that may be was measured with GPT-2 124M in float32 and bfloat16 (docs/LOG.md has the runs):

- Over the first ten steps at B=2, T=256, float32 with another kernel or number of threads stays within 1e-6, and
  bfloat16 within 7e-4. The tolerances of params.yaml are 1e-4 and 3e-3: a hundred and four times that. TF32 keeps two
  bits more than bfloat16 and has 1e-3; it was not measured.
- A wrong attention scale (twice, or 1 / D), the mildest fault that was tried, is 6e-3 to 8e-3 off within those steps.
- Later, rounding grows as in any chaotic system. At B=4, T=32 the loss has a spike after 30 steps, and there the same
  1e-6 has become 3e-4, and the same 2e-3 of bfloat16 0.3. So only the first steps are judged; all are written down.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2_ladder.config import Environment, UserError


@dataclass(frozen=True)
class Parity:
    """How far one level's losses are from the baseline's, in nats.

    Attributes:
        differences: level minus baseline, one per step of the training.
        steps: how many of them, from the first, are judged: what follows is about these.
        largest: the largest of them beyond what is expected, without its sign.
        largest_step: where.
        mean: the mean of their absolute values.
        tolerance: what `largest` must not exceed.
        expected: how much of a positive difference is arithmetic: ln(V' / V) for a larger vocabulary.
    """

    differences: tuple[float, ...]
    steps: int
    largest: float
    largest_step: int
    mean: float
    tolerance: float
    expected: float


def compare(
    name: str,
    losses: Sequence[float],
    baseline: Sequence[float],
    tolerance: float,
    steps: int,
    expected: float = 0.0,
) -> Parity:
    """Compare the losses of level `name` with those of the baseline, and judge the first `steps` of them.

    Rows that pad the vocabulary start as likely as any other, which costs `expected` nats at step 0, and less and less
    as the network learns that they never come. So a difference may lie anywhere between 0 and `expected`, give or
    take `tolerance`.

    Raises:
        UserError: the first step that is further off, with both losses.
    """
    differences = tuple(loss - other for loss, other in zip(losses, baseline, strict=True))
    judged = differences[:steps]
    lowest, highest = min(0.0, expected), max(0.0, expected)
    beyond = [max(lowest - difference, difference - highest, 0.0) for difference in judged]
    for step, difference in enumerate(judged):
        if not lowest - tolerance <= difference <= highest + tolerance:  # written so that NaN fails too
            raise UserError(
                f"parity: at step {step} level '{name}' has a loss of {losses[step]:.5f}, the baseline of "
                f"{baseline[step]:.5f}: {difference:+.5f} where {lowest - tolerance:.5f} to {highest + tolerance:+.5f} "
                "is allowed. The level computes something else, or learns in steeper steps than the tolerance in "
                "params.yaml, parity, was made for"
            )
    largest_step = max(range(len(beyond)), key=beyond.__getitem__)
    mean = math.fsum(map(abs, judged)) / len(judged)
    return Parity(differences, len(judged), beyond[largest_step], largest_step, mean, tolerance, expected)


def check_one_environment(results: Mapping[str, Mapping[str, Any]], environment: Environment) -> None:
    """Raise UserError if a result was made elsewhere: on another machine, torch, Python or number of threads.

    DVC makes again what a change of these concerns; results that were copied together by hand end here.
    """
    for name, found in results.items():
        if found["environment"] != environment.fingerprint:
            raise UserError(
                f"the results of {name} are from environment {found['environment']}, this one is "
                f"{environment.fingerprint} ({environment.device_name}, torch {environment.torch}): they do not belong "
                "into one table; `dvc repro` makes again what is not from here"
            )


def check_one_count(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if results were trained on different numbers of devices; DVC makes them again together."""
    counts = {name: found["devices"] for name, found in results.items()}
    if len({*counts.values()}) > 1:
        told = ", ".join(f"{name} on {count}" for name, count in counts.items())
        raise UserError(f"trained on different numbers of devices: {told}; `dvc repro` trains them alike")


def padding_cost(vocab_size: int, baseline_vocab_size: int) -> float:
    """Return by how many nats a uniform guess is worse over `vocab_size` ids than over `baseline_vocab_size`."""
    return math.log(vocab_size / baseline_vocab_size)
