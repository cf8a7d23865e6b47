"""Gather the results of all levels into results/report: ladder.md and two pictures."""

import csv
import json
from pathlib import Path
from typing import Any

from gpt2_ladder import config, report
from pipeline import RESULTS, read_environment, run

FOLDER = RESULTS / "report"


def main() -> None:
    params, environment = config.load(), read_environment()
    shape = params.shape("speed")
    results = {name: _read(RESULTS / "levels" / name / "metrics.json") for name in params.levels}
    trained = {name: result for name, result in results.items() if result["status"] == "trained"}
    FOLDER.mkdir(parents=True, exist_ok=True)
    markdown = report.ladder_markdown(
        levels=params.levels,
        results=results,
        trial=_read(RESULTS / "trial" / "metrics.json"),
        verify=_read(RESULTS / "verify.json"),
        overfit=_read(RESULTS / "overfit.json"),
        environment=environment,
        shapes={"quality": params.quality, "speed": shape},
    )
    (FOLDER / "ladder.md").write_text(markdown, encoding="utf-8")
    steps = [
        {"level": name, "group": params.levels[name].group, "step": int(row["step"]), "loss": float(row["loss"])}
        for name in trained
        for row in csv.DictReader((RESULTS / "levels" / name / "steps.csv").read_text().splitlines())
    ]
    report.save_loss_chart(steps, FOLDER / "loss.png")
    rates = {
        name: result["tokens_per_second"] for name, result in trained.items() if params.levels[name].group == "speed"
    }
    title = f"GPT-2 ({params.model}), B={shape.batch_size}, T={shape.block_size}, {environment.device_name}"
    report.save_speed_chart(rates, title, FOLDER / "tokens_per_second.png")


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    run(main)
