"""Set `machine: gpu`, and run what a first climb on a GPU can show, the most important part first, in a given time."""

import re
import subprocess
import time
from datetime import date

from dvc.utils.hydra import apply_overrides

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.training import capabilities
from pipeline import Parser, environment, run


def main(*arguments: str) -> None:
    parser = Parser(prog="python -m pipeline.tools.gpu", description=__doc__)
    parser.add_argument("minutes", type=float, help="what does not fit is skipped; `dvc repro` continues the climb")
    minutes = parser.parse_args(arguments).minutes
    deadline, params, machine = time.monotonic() + 60 * minutes, params_yaml.load(), environment.describe()
    capabilities.check_machine("gpu", params.rehearsal, machine)
    apply_overrides("params.yaml", ["machine=gpu"])
    tuned = [name for name, level in params.levels.items() if level.autotune]
    untuned = [f"~levels.{name}" for name in tuned[:1]] + [f"++levels.{name}.autotune=false" for name in tuned[1:]]
    gallery = re.sub("[^a-z0-9]+", "-", machine.device_name.lower()).strip("-")
    gallery += f" --commit {files.git('rev-parse', 'HEAD')} --date {date.today()}"
    plan = {  # with seconds from docs/gpu.md: of an H100; the tests of an H200; the trial and report are a guess
        "dvc repro overfit probe": 100,
        **{f"dvc repro train@{level}": 160 for level in tuned[:1]},  # at most: 120 to compile it, 40 to train it
        "dvc repro benchmark": 525,
        f"python -m pipeline.tools.contribute {gallery}": 10,
        "dvc repro": 60,
        f"python -m pytest -m gpu -n 0 tests/test_gpu.py {'--rehearse' * params.rehearsal}": 230,
    }
    print(f"Plan for {minutes:g} minutes, with estimates for an H100 and 16 cores:")
    print(*(f"{seconds:5} s  {command}" for command, seconds in plan.items()), sep="\n", flush=True)
    for command, seconds in plan.items():
        tunes, left = "@" in command, deadline - time.monotonic()
        if left < (seconds + plan["dvc repro benchmark"] if tunes else 0 if command.startswith("dvc") else seconds):
            print(f"gpu: {command}: skipped, because {max(0, left):.0f} s are left", flush=True)
            apply_overrides("params.yaml", untuned * (tunes and left > 0))  # so that the benchmark may fit
        elif not run_for(min(left, seconds) if tunes else left, command):
            print(f"gpu: {command}: stopped at the end of its time{', and left out' * tunes}", flush=True)
            apply_overrides("params.yaml", untuned * tunes)


def run_for(seconds: float, command: str) -> bool:
    """Run `command`, interrupt it after `seconds`, and return whether it had ended. Raise UserError if it fails."""
    with subprocess.Popen(["timeout", "--signal=INT", "--kill-after=20", f"{seconds}", *command.split()]) as process:
        try:
            code = process.wait()
        finally:
            process.terminate()  # after Ctrl-C, which does not reach the processes of timeout
    if code not in (0, 124, -9):  # -9: timeout has killed its whole group, itself included
        raise UserError(f"{command}: failed, for the reason above")
    return code == 0


if __name__ == "__main__":
    run(main)
