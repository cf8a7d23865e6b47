"""Check that speed does not cost quality: compare every speed level's loss curve with the baseline's, step by step.

All speed levels start from the same weights and see the same batches, so their losses differ by rounding alone. With
GPT-2 124M that was up to 1e-6 in float32 and 7e-4 in bfloat16 over the first ten steps at B=2, T=256; the tolerances in
params.yaml are 1e-4 and 3e-3, and 1e-3 for TF32, which was not measured. The mildest fault that was tried, a wrong
attention scale, differs by 6e-3. In later steps rounding grows to 0.3 nats, so these are not judged (docs/LOG.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2_ladder.config import Environment, UserError


@dataclass(frozen=True)
class Parity:
    """Differences between one level's losses and the baseline's, in nats.

    Attributes:
        differences: level minus baseline, one per step of the training.
        steps: the number of first steps that are judged.
        largest: among these, the largest absolute difference beyond `expected`; at most `tolerance`.
        largest_step: the step with that difference.
        tolerance: from params.yaml.
        expected: the difference that arithmetic explains: ln(V' / V) for a larger vocabulary.
    """

    differences: tuple[float, ...]
    steps: int
    largest: float
    largest_step: int
    tolerance: float
    expected: float


def compare(
    name: str, losses: Sequence[float], baseline: Sequence[float], tolerance: float, steps: int, expected: float = 0.0
) -> Parity:
    """Compare the losses of level `name` with the baseline's, and judge the first `steps` of them.

    Rows that pad the vocabulary cost `expected` nats at step 0, when all tokens are equally likely, and less as the
    network learns that they never occur. So a difference between 0 and `expected`, plus or minus `tolerance`, is
    accepted. Raise UserError, with the first such step, if a step differs by more.
    """
    differences = tuple(loss - other for loss, other in zip(losses, baseline, strict=True))
    judged = differences[:steps]
    lowest, highest = min(0.0, expected), max(0.0, expected)
    for step, difference in enumerate(judged):
        if not lowest - tolerance <= difference <= highest + tolerance:  # written so that NaN fails too
            raise UserError(
                f"parity: at step {step} level '{name}' has a loss of {losses[step]:.5f}, the baseline has "
                f"{baseline[step]:.5f}: the difference of {difference:+.5f} is not within {lowest - tolerance:.5f} to "
                f"{highest + tolerance:+.5f}. Check what the level computes, or raise the tolerance in params.yaml, "
                "parity, if you raised the learning rate"
            )
    beyond = [max(lowest - difference, difference - highest, 0.0) for difference in judged]
    largest_step = max(range(len(beyond)), key=beyond.__getitem__)
    return Parity(differences, len(judged), beyond[largest_step], largest_step, tolerance, expected)


def check_one_environment(results: Mapping[str, Mapping[str, Any]], environment: Environment) -> None:
    """Raise UserError if a result is from another machine, torch, Python or number of threads, as if copied by hand."""
    for name, result in results.items():
        if result["environment"] != environment.fingerprint:
            raise UserError(
                f"the results of {name} are from environment {result['environment']}, not {environment.fingerprint} "
                f"({environment.device_name}, torch {environment.torch}): run `dvc repro` to measure them here"
            )


def check_one_count(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if results were trained on different numbers of devices."""
    counts = {name: result["devices"] for name, result in results.items()}
    if len({*counts.values()}) > 1:
        listed = ", ".join(f"{name} on {count}" for name, count in counts.items())
        raise UserError(f"trained on different numbers of devices: {listed}; run `dvc repro` to train them again")


def padding_cost(vocab_size: int, baseline_vocab_size: int) -> float:
    """Return by how many nats a uniform guess over `vocab_size` ids is worse than over `baseline_vocab_size`."""
    return math.log(vocab_size / baseline_vocab_size)
