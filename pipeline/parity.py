"""Check that the losses of all speed levels equal the losses of the baseline, up to rounding.

The benchmark then measures the levels listed in results/parity.json.
"""

import math
from dataclasses import asdict

from gpt2_ladder import files
from gpt2_ladder.config import Level, UserError
from gpt2_ladder.measuring import loss_parity
from gpt2_ladder.training import capabilities, metrics
from gpt2_ladder.training.precisions import PRECISIONS
from pipeline import PARITY, RESULTS, read_metrics, read_settings, run

ROUNDING = "precision", "compile", "attention", "vocab_size", "autotune"  # changing one of these changes the rounding


def main() -> None:
    params, environment = read_settings()
    results = {name: read_metrics(name) for name, level in params.levels.items() if level.group == "speed"}
    trained = {name: result for name, result in results.items() if result["status"] == "trained"}
    if not trained:
        raise UserError("parity: no speed level was trained; see `reason` in results/levels/*/metrics.json")
    loss_parity.check_one_environment(trained, environment)
    loss_parity.check_one_count(trained)
    micro_batch = min(result["micro_batch"] for result in trained.values())  # the benchmark uses it for all levels
    parts = math.ceil(params.shape("speed").batch_size / micro_batch)
    for name in capabilities.rows_without_effect(params.levels, environment, parts):
        trained.pop(name, None)
    baseline, levels = next(iter(trained)), {}
    curves = {name: RESULTS / "levels" / name / "steps.csv" for name in trained}
    losses = {name: metrics.read_losses(path) for name, path in curves.items()}
    counts = {name: min(params.parity.steps, metrics.count_before_skip(path)) for name, path in curves.items()}
    acting = {name: capabilities.effective(params.levels[name], environment, parts) for name in trained}
    for above, (name, level) in zip([baseline, *trained], acting.items(), strict=False):
        check_matmul_precision(name, level, trained[name]["float32_matmul_precision"])
        if all(getattr(level, switch) == getattr(acting[above], switch) for switch in ROUNDING):
            steps, tolerance = min(counts[name], counts[above]), params.parity.previous_level
            loss_parity.compare(name, losses[name], losses[above], tolerance, steps, 0, f"level '{above}'")
        steps, tolerance = counts[name], getattr(params.parity, level.precision)
        expected = loss_parity.padding_cost(level.vocab_size, acting[baseline].vocab_size)
        parity = loss_parity.compare(name, losses[name], losses[baseline], tolerance, steps, expected)
        largest = f"largest loss difference of {steps} steps {parity.largest:.6f} nats at step {parity.largest_step}"
        print(f"{name:8}  {largest}, tolerance {tolerance}")
        levels[name] = {"switches": level.model_dump(exclude={"group"}), **asdict(parity)}
    content = {"environment": environment.fingerprint, "baseline": baseline, "micro_batch": micro_batch}
    files.write_json(PARITY, {**content, "levels": levels})


def check_matmul_precision(name: str, level: Level, recorded: str) -> None:
    """Raise UserError if the level was trained with TF32 but its row has another precision, or the reverse.

    On a CPU the losses cannot show this, because TF32 has no effect.
    """
    if recorded != (wanted := PRECISIONS[level.precision].float32_matmul):
        raise UserError(
            f"parity: level '{name}' was trained with {recorded} matrix products, but precision {level.precision} "
            f"means {wanted}; fix runtime.set_precision"
        )


if __name__ == "__main__":
    run(main)
