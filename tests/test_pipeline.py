"""The real pipeline under real DVC, on the tiny model, in a repository of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

LEVELS = ["untied", "tied", "init", "fp32", "tf32", "bf16", "compile", "flash", "padded"]


def call(folder: Path, *command: str) -> str:
    """Run a command with this interpreter's environment first on PATH; return what it printed."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "DVC_"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NETRC": str(folder / "no-netrc"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        **{
            f"GIT_{who}_{what}": f"{what.lower()}@test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        },
    }
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def stages_that_ran(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with this one's files as they are now, no results, and the tiny model chosen."""
    folder = tmp_path_factory.mktemp("clone")
    listed = call(REPOSITORY, "git", "ls-files", "--cached", "--others", "--exclude-standard")
    for name in listed.splitlines():
        if (REPOSITORY / name).exists() and not name.startswith("results/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    replace(folder / "params.yaml", "model: gpt2 ", "model: tiny ")
    call(folder, "git", "init", "--quiet")
    call(folder, "git", "add", ".")
    call(folder, "git", "commit", "--quiet", "--message", "Start")
    return folder


@pytest.fixture(scope="module")
def first_run(clone: Path) -> str:
    output = call(clone, "dvc", "repro")
    call(clone, "git", "add", ".")
    call(clone, "git", "commit", "--quiet", "--message", "Climb")
    return output


def read_metrics(clone: Path, name: str) -> dict:
    return json.loads((clone / "results" / name / "metrics.json").read_text())


def test_every_stage_runs(first_run):
    others = {"environment", "download", "tokenize", "verify", "overfit", "trial", "report"}
    assert stages_that_ran(first_run) == others | {f"train@{level}" for level in LEVELS}


def test_every_level_is_trained_and_the_speed_levels_agree(first_run, clone):
    found = {level: read_metrics(clone, f"levels/{level}") for level in LEVELS}
    assert {metrics["status"] for metrics in found.values()} <= {"trained", "skipped"}
    trained = {level: metrics for level, metrics in found.items() if metrics["status"] == "trained"}
    assert {"untied", "tied", "init", "fp32", "tf32"} <= set(trained)
    assert found["tf32"]["note"]
    assert (found["fp32"]["float32_matmul_precision"], found["tf32"]["float32_matmul_precision"]) == ("ieee", "tf32")
    for level in set(trained) & {"tf32", "bf16", "compile", "flash", "padded"}:
        # same weights, same batches: 1e-2 is bfloat16's rounding after ten steps, far below what a bug would cost
        assert found[level]["loss_first"] == pytest.approx(found["fp32"]["loss_first"], abs=2e-3)
        assert found[level]["loss_last"] == pytest.approx(found["fp32"]["loss_last"], abs=5e-2)
    rows = (clone / "results/levels/init/steps.csv").read_text().splitlines()
    assert len(rows) == 51
    assert float(rows[-1].split(",")[1]) == found["init"]["loss_last"]


def test_the_trial_starts_out_as_the_fp32_level(first_run, clone):
    trial, fp32 = read_metrics(clone, "trial"), read_metrics(clone, "levels/fp32")
    assert (trial["loss_first"], trial["loss_last"], trial["val_loss"]) == (
        fp32["loss_first"],
        fp32["loss_last"],
        fp32["val_loss"],
    )
    assert (clone / "models/trial/model.safetensors").exists()


def test_the_shards_are_those_of_nanogpt(first_run, clone):
    tokens = [json.loads((clone / f"data/{name}.json").read_text())["tokens"] for name in ("train", "val")]
    assert tokens == [301_966, 36_059]


def test_the_stand_in_is_called_one_everywhere(first_run, clone):
    assert json.loads((clone / "results/verify.json").read_text())["weights"] == "stand-in"
    assert "stand-in" in (clone / "data/gpt2/model.safetensors.provenance.json").read_text()
    assert "NOT verified" in (clone / "results/report/ladder.md").read_text()
    assert "NOT verified" in first_run


def test_every_training_has_a_run_of_its_own(first_run, clone):
    trained = [level for level in LEVELS if read_metrics(clone, f"levels/{level}")["status"] == "trained"]
    assert len(list(clone.glob("wandb/offline-run-*"))) >= len(trained) + 2  # overfit and trial


def test_nothing_untracked_is_left_behind(first_run, clone):
    assert call(clone, "git", "status", "--porcelain") == ""


def test_a_second_run_runs_nothing_but_the_environment(first_run, clone):
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}


def test_an_experiment_runs_the_trial_alone(first_run, clone):
    output = call(clone, "dvc", "exp", "run", "-S", "precision=bf16", "-S", "run_slow_levels=false")
    assert stages_that_ran(output) == {"environment", "trial", "report"}
    assert "precision" in call(clone, "dvc", "params", "diff")
    assert "results/trial/metrics.json" in call(clone, "dvc", "metrics", "diff")
    call(clone, "git", "restore", "params.yaml", "dvc.lock", "results")
    call(clone, "dvc", "checkout")
    assert call(clone, "git", "status", "--porcelain") == ""


def test_an_edited_row_runs_that_level_alone(first_run, clone):
    old = "{group: quality, tie_weights: true, init: gpt2,"
    replace(clone / "params.yaml", old, old.replace("gpt2", "pytorch"))
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment", "train@init", "report"}
