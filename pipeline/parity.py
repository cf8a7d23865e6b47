"""Check that no speed level pays with quality: its losses are the baseline's, up to the rounding of its precision.

The benchmark measures the levels that pass, and reads from results/parity.json which those are.
"""

import csv
from dataclasses import asdict
from typing import Any

from gpt2_ladder import params_yaml
from gpt2_ladder.config import Level, UserError
from gpt2_ladder.measuring import loss_parity
from gpt2_ladder.training.runtime import PRECISIONS
from pipeline import PARITY, RESULTS, read_environment, read_metrics, run, write_json


def main() -> None:
    params = params_yaml.load()
    results = {name: read_metrics(name) for name, level in params.levels.items() if level.group == "speed"}
    trained = [name for name, found in results.items() if found["status"] == "trained"]
    if not trained:
        raise UserError("parity: no speed level was trained; results/levels/*/metrics.json say why")
    environment, baseline = read_environment(), trained[0]
    loss_parity.check_one_environment({name: results[name] for name in trained}, environment)
    loss_parity.check_one_count({name: results[name] for name in trained})
    found: dict[str, Any] = {}
    for name in trained:
        level = params.levels[name]
        check_matmul_precision(name, level, results[name]["float32_matmul_precision"])
        expected = loss_parity.padding_cost(level.vocab_size, params.levels[baseline].vocab_size)
        tolerance = getattr(params.parity, level.precision)
        agreement = loss_parity.compare(
            name, _losses(name), _losses(baseline), tolerance, params.parity.steps, expected
        )
        print(f"{name:8}  largest {agreement.largest:.6f} at step {agreement.largest_step}, allowed {tolerance}")
        found[name] = {"switches": level.model_dump(), **asdict(agreement)}
    write_json(
        PARITY,
        {
            "environment": environment.fingerprint,
            "baseline": baseline,
            "micro_batch": min(results[name]["micro_batch"] for name in found),  # the benchmark's, for all levels
            "levels": found,
        },
    )


def check_matmul_precision(name: str, level: Level, recorded: str) -> None:
    """Raise UserError if the level was trained with TF32 on where its row does not ask for it, or off where it does.

    On a CPU TF32 changes nothing, so no loss could tell.
    """
    if recorded != PRECISIONS[level.precision].float32_matmul:
        raise UserError(
            f"parity: level '{name}' was trained with {recorded} matrix products where precision {level.precision} "
            f"means {PRECISIONS[level.precision].float32_matmul}; mend runtime.set_precision"
        )


def _losses(name: str) -> list[float]:
    rows = (RESULTS / "levels" / name / "steps.csv").read_text().splitlines()
    return [float(row["loss"]) for row in csv.DictReader(rows)]


if __name__ == "__main__":
    run(main)
