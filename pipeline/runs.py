"""Lay the W&B runs of one group side by side: `python -m pipeline.runs`, of this folder's runs, the newest group.

Runs that did not finish are named and left out.
"""

import sys
from pathlib import Path

from gpt2_ladder import params_yaml, runs, tables, tracking
from gpt2_ladder.config import UserError
from pipeline import Parser, run


def main(*arguments: str) -> None:
    parser = Parser(prog="python -m pipeline.runs", description=__doc__)
    parser.add_argument("--group", help="a group of runs, instead of the newest")
    parser.add_argument(
        "--online", nargs="?", const=tracking.project(), metavar="PROJECT", help="ask the W&B server; OWNER/NAME"
    )
    asked = parser.parse_args(arguments)
    levels = params_yaml.load().levels
    if asked.online is not None and not tracking.has_key():
        raise UserError("W&B has no key here: run `wandb login`, or leave out --online for the runs of this folder")
    where = str(tracking.folder() / "wandb" if asked.online is None else asked.online)
    found = list(runs.online(where, asked.group) if asked.online is not None else runs.local(Path(where), asked.group))
    for unfinished in (one for one in found if one.state != "finished"):
        print(f"{unfinished.where}: left out, {unfinished.state}", file=sys.stderr)
    trained = [one for one in found if one.state == "finished" and one.job_type in runs.TRAININGS]
    if not trained:
        of = f" of the group {asked.group}" if asked.group else ""
        raise UserError(f"{where}: no finished training{of} is there")
    print(f"{where}, group {trained[0].group}\n")
    print(tables.markdown_table(runs.table(trained, levels)))


if __name__ == "__main__":
    run(main)
