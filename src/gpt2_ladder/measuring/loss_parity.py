"""Check that speed does not cost quality: compare every speed level's loss curve with the baseline's, step by step.

All speed levels start from the same weights and train on the same batches, so only rounding makes their losses differ.
In the first three steps, the losses of right runs differed by up to 2e-6 nats in float32 (1.2e-4 with padded rows),
2.3e-3 in bfloat16 (`tiny` and an H200), 1.6e-3 in float16, 4.2e-4 in TF32 (H100) and, between levels that round alike,
6.9e-4 (124M on a CPU). params.yaml allows twice that or more. Later steps are not checked, because they amplify
rounding: after five steps, right runs of 124M differed by up to 0.019 nats, and after ten, those of `tiny` by 0.08.
step_check.py finds the faults that this cannot see; docs/evidence.md has the numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2_ladder.config import Environment, UserError


@dataclass(frozen=True)
class Parity:
    """Differences between one level's losses and the baseline's, in nats."""

    differences: tuple[float, ...]  # level minus baseline, for every step
    steps: int  # number of steps that are checked, from step 0 on
    largest: float  # largest absolute difference in the checked steps, in excess of `expected`
    largest_step: int  # the step with the difference `largest`
    tolerance: float  # largest allowed difference, from params.yaml
    expected: float  # difference that a padded vocabulary explains: ln(V' / V)


def compare(
    name: str,
    losses: Sequence[float],
    baseline: Sequence[float],
    tolerance: float,
    steps: int,
    expected: float = 0.0,
    other: str = "the baseline",
) -> Parity:
    """Compare the losses of level `name` with those of `other`; raise UserError if the first `steps` losses differ.

    A padded vocabulary adds `expected` nats to the loss at step 0, when all tokens are equally likely, and less later,
    because the network learns that the added tokens never occur. So differences from 0 to `expected` are allowed, plus
    or minus `tolerance`.
    """
    differences = tuple(loss - other for loss, other in zip(losses, baseline, strict=True))
    checked = differences[:steps]
    lowest, highest = min(0.0, expected), max(0.0, expected)
    for step, difference in enumerate(checked):
        if not lowest - tolerance <= difference <= highest + tolerance:  # written so that NaN fails too
            raise UserError(
                f"parity: at step {step} level '{name}' has a loss of {losses[step]:.5f}, {other} has "
                f"{baseline[step]:.5f}: the difference of {difference:+.5f} is not within {lowest - tolerance:.5f} to "
                f"{highest + tolerance:+.5f}. Fix the level's code, or, if you raised the learning rate, "
                "raise the tolerance in params.yaml, under `parity`"
            )
    beyond = [max(lowest - difference, difference - highest, 0.0) for difference in checked]
    largest_step = max(range(len(beyond)), key=beyond.__getitem__)
    return Parity(differences, len(checked), beyond[largest_step], largest_step, tolerance, expected)


def check_one_environment(results: Mapping[str, Mapping[str, Any]], environment: Environment) -> None:
    """Raise UserError unless all results have the machine, torch, Python and number of threads of `environment`."""
    for name, result in results.items():
        if result["environment"] != environment.fingerprint:
            raise UserError(
                f"the results of {name} are from environment {result['environment']}, not {environment.fingerprint} "
                f"({environment.device_name}, torch {environment.torch}): run `dvc repro` to measure them again"
            )


def check_one_count(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if results were trained on different numbers of devices."""
    counts = {name: result["devices"] for name, result in results.items()}
    if len({*counts.values()}) > 1:
        listed = ", ".join(f"{name} on {count}" for name, count in counts.items())
        raise UserError(f"trained on different numbers of devices: {listed}; run `dvc repro` to train them again")


def padding_cost(vocab_size: int, baseline_vocab_size: int) -> float:
    """Return the extra loss, in nats, of a uniform guess over `vocab_size` instead of `baseline_vocab_size` tokens."""
    return math.log(vocab_size / baseline_vocab_size)
