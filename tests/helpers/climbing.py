"""Run the real pipeline under real DVC, on the tiny model, in a repository of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dvc.utils.serialize import modify_yaml

REPOSITORY = Path(__file__).parents[2]
LEVELS = ("untied", "init", "fp32", "bf16", "chunked")  # two quality levels, baseline, cast, every switch at once
SECRET = "5ec2e7" * 7  # as long as a W&B key
ADDRESS = f"https://user:{SECRET}@127.0.0.1:9/ladder.git"
NO_SECRET = "a note in the environment that may be recorded"
PLANTED = {  # the environment of the climb
    **dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"), SECRET),
    **dict.fromkeys(("HF_ENDPOINT", "WANDB_BASE_URL", "WANDB_HTTPS_PROXY"), ADDRESS),
    **{"WANDB_MODE": "offline", "WANDB_NOTES": NO_SECRET},
}


def call(folder: Path, *command: str, exit_code: int = 0, stderr: bool = False) -> str:
    """Run a command in `folder` with this Python's programs first on PATH; return its stdout, or its stderr."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "DVC_"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",  # the expected numbers are a CPU's
        "NETRC": str(folder / "no-netrc"),
        **{"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "commit.gpgsign", "GIT_CONFIG_VALUE_0": "false"},
        **{
            f"GIT_{role}_{field}": f"{field.lower()}@test"
            for role in ("AUTHOR", "COMMITTER")
            for field in ("NAME", "EMAIL")
        },
    }
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == exit_code, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stderr if stderr else result.stdout


def get_back(clone: Path) -> None:
    """Return to the committed state with the README's commands."""
    call(clone, "git", "restore", "params.yaml", "dvc.lock", "results")
    call(clone, "dvc", "checkout")
    assert call(clone, "git", "status", "--porcelain") == ""


def wandb_runs(clone: Path) -> int:
    """Count the offline runs in W&B's folder."""
    return len(list(clone.glob("wandb/offline-run-*")))


def stages_that_ran(output: str) -> set[str]:
    """Return the names of the stages in DVC's output, without the dvc.yaml that they are in."""
    return {line.split("'")[1].split(":")[-1] for line in output.splitlines() if line.startswith("Running stage '")}


def set_param(folder: Path, key: str, value: object) -> None:
    """Set a value in params.yaml as `-S` does, by a dotted key; a new key is added."""
    with modify_yaml(folder / "params.yaml") as params:
        *parents, last = key.split(".")
        for parent in parents:
            params = params[parent]
        params[last] = value


def read_metrics(clone: Path, name: str) -> dict:
    """Return the facts of the trial or, for "levels/NAME", the metrics of a level."""
    file = "facts.json" if name == "trial" else "metrics.json"
    return json.loads((clone / "results" / name / file).read_text())


def climb(folder: Path) -> str:
    """Fill `folder` with this repository's current files, run LEVELS with the tiny model, commit; return the output."""
    listed = call(REPOSITORY, "git", "ls-files", "--cached", "--others", "--exclude-standard")
    for name in listed.splitlines():
        if (REPOSITORY / name).exists() and not name.startswith("results/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    with modify_yaml(folder / "params.yaml") as params:
        params |= {"model": "tiny", "profile": False}
        params["levels"] = {name: params["levels"][name] for name in LEVELS}
        params["quality"] |= {"batch_size": 2, "block_size": 16, "steps": 35, "eval_tokens": 512}
        params["machines"]["cpu"] |= {"block_size": 64, "eval_tokens": 512, "steps": 4, "warmup_steps": 1}
        params["benchmark"]["cpu"]["rounds"] = 6
        params["trial"]["cpu"]["seconds"] = 3
    call(folder, "git", "init", "--quiet")
    call(folder, "git", "add", ".")
    call(folder, "git", "commit", "--quiet", "--message", "Start")
    call(folder, "git", "remote", "add", "origin", ADDRESS)
    output = call(folder, "env", *(f"{name}={value}" for name, value in PLANTED.items()), "dvc", "repro")
    call(folder, "git", "add", ".")
    call(folder, "git", "commit", "--quiet", "--message", "Climb")
    return output
