"""Write results/report: the ladder as Markdown and HTML, charts, all losses. Send it to W&B, print a summary."""

from pathlib import Path
from typing import Any

import altair as alt

from gpt2_ladder import files
from gpt2_ladder.params import Params
from gpt2_ladder.reporting import charts, facts, gallery
from gpt2_ladder.running import tracking
from gpt2_ladder.training.metrics import read_losses
from pipeline import RESULTS, SECONDS, TRIAL_FACTS, read_metrics, read_settings, run

FOLDER = RESULTS / "report"
OUTPUTS = ("gains", "parity", "profile", "device_time", "verify", "overfit")  # JSON files of other stages
TITLES = {"quality": "quality levels", "speed": "speed levels", "trial": "trial"}


def main() -> None:
    params, environment = read_settings()
    results = {name: read_metrics(name) for name in params.levels}
    outputs: dict[str, Any] = {name: files.read_json(RESULTS / f"{name}.json") for name in OUTPUTS}
    gains, parity, trial = outputs["gains"], outputs["parity"], files.read_json(TRIAL_FACTS)
    reference = gallery.read(gallery.FOLDER / "h100-sxm.json")
    explained = {path.stem for path in Path("docs/levels").glob("*.md")}  # it only links to them: no dependency
    outputs |= {"trial": trial, "seconds": read_seconds(params), "reference": reference, "explained": explained}
    content = facts.collect(params, environment, results, **outputs)
    comparable = not any(key.startswith("recipe.") for key in trial["changes"])
    losses: dict[str, dict[str, list[float]]] = {group: {} for group in TITLES}
    for name, level in params.levels.items():
        losses[level.group][name] = read_losses(RESULTS / "levels" / name / "steps.csv")
    for group in ("speed", "trial") if comparable else ("trial",):
        losses[group]["trial"] = read_losses(RESULTS / "trial/steps.csv")
    differences = {name: level["differences"] for name, level in parity["levels"].items()}
    pictures: dict[str, alt.TopLevelMixin] = {
        "ladder": charts.waterfall(facts.ladder_steps(gains)),
        **{group: charts.losses(curves, TITLES[group]) for group, curves in losses.items() if any(curves.values())},
        "parity": charts.losses(differences, f"speed levels, difference to {parity['baseline']}", "nats"),
    }
    for name, chart in pictures.items():
        charts.save_png(chart, FOLDER / f"{name}.png")
    files.write(FOLDER / "ladder.md", facts.templates.get_template("ladder.md").render(content, pictures=pictures))
    drawings = {name: charts.svg(chart) for name, chart in pictures.items()}  # SVG elements: loads no other file
    files.write(FOLDER / "ladder.html", facts.templates.get_template("ladder.html").render(content, pictures=drawings))
    lines = ["group,level,step,loss"]
    for group, curves in losses.items():
        lines += [f"{group},{name},{step},{loss}" for name, curve in curves.items() for step, loss in enumerate(curve)]
    files.write(FOLDER / "losses.csv", "\n".join([*lines, ""]))  # for `dvc plots`
    files.write(FOLDER / "summary.txt", summary := facts.templates.get_template("summary.txt").render(content))
    images = {name: FOLDER / f"{name}.png" for name in pictures if name != "ladder"}
    tracking.log_summary(params, environment, gains, drawings["ladder"], images)
    print(summary, end="")


def read_seconds(params: Params) -> dict[str, dict[str, float]]:
    """Return the ledger of every stage; stages that were run by hand, in another way, have none."""
    trainings = (f"train/{name}" for name in params.levels)
    stages = "download", "tokenize", "verify", "overfit", "probe", *trainings, "parity", "benchmark", "trial"
    return {name: files.read_json(path) for name in stages if (path := SECONDS / f"{name}.json").exists()}


if __name__ == "__main__":
    run(main)
