"""Two people share a Git repository and a DVC remote: a folder here, a bucket elsewhere."""

import json
from pathlib import Path

import pytest

from helpers.climbing import LEVELS, call, read_metrics, stages_that_ran

pytestmark = pytest.mark.slow
TRAININGS = {"overfit", "trial", *(f"train@{level}" for level in LEVELS)}


@pytest.fixture(scope="module")
def team(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the team's Git repository, its DVC remote, both filled from a climb, and two clones."""
    folder = tmp_path_factory.mktemp("team")
    call(clone, "dvc", "remote", "add", "--default", "store", str(folder / "store"))
    call(clone, "git", "commit", "--quiet", "--all", "--message", "Name the store")
    call(clone, "dvc", "push")
    call(folder, "git", "clone", "--quiet", "--bare", str(clone), "team.git")
    for name in ("ada", "bob"):
        call(folder, "git", "clone", "--quiet", "team.git", name)
    return folder


def test_a_fresh_clone_trains_nothing_after_dvc_pull(team):
    ada = team / "ada"
    assert set(json.loads(call(ada, "dvc", "status", "--json"))) >= TRAININGS
    call(ada, "dvc", "pull")
    assert stages_that_ran(call(ada, "dvc", "repro")) == {"environment"}
    assert call(ada, "git", "status", "--porcelain") == ""


def test_another_machine_trains_everything_again(team):
    bob = team / "bob"
    call(bob, "dvc", "pull")
    call(bob, "env", "OMP_NUM_THREADS=7", "dvc", "repro", "pipeline/environment-stage/dvc.yaml:environment")
    measured = {"pipeline/environment-stage/dvc.yaml:environment", "probe", "parity", "benchmark", "report"}
    assert set(json.loads(call(bob, "dvc", "status", "--json"))) == TRAININGS | measured
    call(bob, "git", "restore", ".")


def test_an_experiment_is_shared_without_training_it_twice(team):
    ada, bob = team / "ada", team / "bob"
    assert "trial" in stages_that_ran(call(ada, "dvc", "exp", "run", "--name", "ours", "-S", "precision=bf16"))
    call(ada, "dvc", "exp", "push", "origin", "ours")
    assert "ours" in call(bob, "dvc", "exp", "list", "origin")
    call(bob, "dvc", "exp", "pull", "origin", "ours")
    call(bob, "dvc", "exp", "apply", "ours")
    assert stages_that_ran(call(bob, "dvc", "repro")) == {"environment"}
    assert read_metrics(bob, "trial") == read_metrics(ada, "trial")
    for name in ("results/trial/steps.csv", "models/trial/model.safetensors"):
        assert (bob / name).read_bytes() == (ada / name).read_bytes()
