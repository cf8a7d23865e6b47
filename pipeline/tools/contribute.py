"""Write machines/NAME.json, the gallery's file about this machine, from results/."""

import argparse
import getpass
import json
import re
import socket
from typing import Any

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring.cost import Operator
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.reporting import gallery
from gpt2_ladder.training.metrics import read_losses
from pipeline import RESULTS, Parser, run


def main(*arguments: str) -> None:
    parser = Parser(prog="python -m pipeline.tools.contribute", description=__doc__)
    parser.add_argument("name", help="name of the file, such as rtx-4090")
    parser.add_argument("--title", help="title of the machine's column, such as 'RTX 4090'")
    parser.add_argument("--note", action="append", default=[], help="something a reader must know; can be repeated")
    parser.add_argument("--commit", help="commit of this project that was measured (default: the last one of its code)")
    parser.add_argument("--date", help="day of the measurement, YYYY-MM-DD (default: of the results' commit)")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", options.name):
        raise UserError(f"{options.name}: name the machine with a-z, 0-9 and single hyphens, such as rtx-4090")
    if not (options.commit and options.date):
        options.commit, options.date = committed()
    path = gallery.FOLDER / f"{options.name}.json"
    try:
        text = describe(options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{RESULTS}: not the results of a climb ({' '.join(repr(error).split()):.200})") from None
    for private in {getpass.getuser(), socket.gethostname().partition(".")[0]} - {"root"}:
        if re.search(rf"\b{re.escape(private)}\b", text):
            raise UserError(f"'{private}' is the name of this user or machine; remove it from --title or --note")
    gallery.parse(text, path)
    files.write(path, text)
    print(f"{path} is written. Read it, run `make docs`, and open a pull request with all that changed.")


def describe(options: argparse.Namespace) -> str:
    """Return the content of the file, without the paths that messages of a compiler contain."""
    benchmark = Measurement.model_validate(files.read_json(RESULTS / "benchmark.json"))
    fp16 = '"precision": "fp16"' in (RESULTS / "parity.json").read_text()
    content = {
        "version": 1,
        "title": options.title or benchmark.environment.device_name[:40],
        "commit": options.commit,
        "date": options.date,
        "benchmark": benchmark.model_dump(),
        "levels": {name: training.model_dump() for name, training in trainings().items()},
        "notes": options.note + ["Here, bf16 stands for fp16."] * fp16,
    }
    return re.sub(r"(?<![\w):/])~?/[^\s\"\\]+", "PATH", json.dumps(content, indent=1, allow_nan=False)) + "\n"


def committed() -> tuple[str, str]:
    """Return the last commit of the code that made the results, and their day; raise UserError if not committed."""
    last = files.git("log", "-1", "--format=%H %cs", "--", str(RESULTS / "benchmark.json")) or ""
    commit, _, date = last.partition(" ")
    if files.git("status", "--porcelain", "--", str(RESULTS)) != "" or not date:
        raise UserError(f"{RESULTS}: not committed; commit the results first, or give --commit and --date")
    return files.git("log", "-1", "--format=%H", commit, "--", "src/*.py", "pipeline/*.py") or commit, date


def trainings() -> dict[str, gallery.Training]:
    """Return what every level's training and profile showed; what a climb of older code lacks stays empty."""
    parity = files.read_json(RESULTS / "parity.json")["levels"]
    profile = files.read_json(RESULTS / "profile.json") if (RESULTS / "profile.json").exists() else {}
    trained = {}
    for path in sorted(RESULTS.glob("levels/*/metrics.json")):
        name, metrics = path.parent.name, files.read_json(path)
        measured = {field: metrics[field] for field in gallery.Training.model_fields if field in metrics}
        trained[name] = gallery.Training(
            **{**measured, "note": metrics["reason"] or metrics["note"]},
            losses=tuple(read_losses(path.with_name("steps.csv"))),
            loss_difference=parity[name]["largest"] if name in parity else None,
            operators=costliest(profile.get(name, [])),
        )
    return trained


def costliest(operators: list[dict[str, Any]]) -> tuple[Operator, ...]:
    """Return those of `operators`, the costliest first, that take 0.5 % of the step, and one row for all others."""
    least = 0.005 * sum(row["self_ms"] for row in operators)
    kept = [Operator(**row) for row in operators if row["self_ms"] >= least]
    others = [Operator(**row) for row in operators[len(kept) :]]
    rest = Operator(gallery.OTHERS, sum(row.calls for row in others), sum(row.self_ms for row in others))
    return (*kept, rest) if others else tuple(kept)


if __name__ == "__main__":
    run(main)
