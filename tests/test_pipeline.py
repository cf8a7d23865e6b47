"""The real pipeline under real DVC, on the tiny model, in a repository of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY
from dvc.utils.serialize import modify_yaml

from gpt2_ladder import config, metrics

LEVELS = list(config.load(REPOSITORY / "params.yaml").levels)


def call(folder: Path, *command: str, exit_code: int = 0) -> str:
    """Run a command with this interpreter's environment first on PATH; return what it printed."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "DVC_"))},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",  # what is asserted of numbers below holds on a CPU
        "NETRC": str(folder / "no-netrc"),
        **{"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "commit.gpgsign", "GIT_CONFIG_VALUE_0": "false"},
        **{
            f"GIT_{who}_{what}": f"{what.lower()}@test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        },
    }
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == exit_code, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def get_back(clone: Path) -> None:
    """What the README says about getting back to the committed state."""
    call(clone, "git", "restore", "params.yaml", "dvc.lock", "results")
    call(clone, "dvc", "checkout")
    assert call(clone, "git", "status", "--porcelain") == ""


def wandb_runs(clone: Path) -> int:
    return len(list(clone.glob("wandb/offline-run-*")))


def stages_that_ran(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")}


def set_param(folder: Path, key: str, value: object) -> None:
    """Set a value in params.yaml as `-S` does, by a dotted key; a new key is added."""
    with modify_yaml(folder / "params.yaml") as params:
        *parents, last = key.split(".")
        for parent in parents:
            params = params[parent]
        params[last] = value


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with this one's files as they are now, no results, and the tiny model chosen."""
    folder = tmp_path_factory.mktemp("clone")
    listed = call(REPOSITORY, "git", "ls-files", "--cached", "--others", "--exclude-standard")
    for name in listed.splitlines():
        if (REPOSITORY / name).exists() and not name.startswith("results/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    set_param(folder, "model", "tiny")
    set_param(folder, "quality.eval_tokens", 512)
    for name, value in {"block_size": 64, "eval_tokens": 512, "steps": 4, "warmup_steps": 1}.items():
        set_param(folder, f"machines.cpu.{name}", value)
    set_param(folder, "benchmark.cpu.rounds", 6)
    set_param(folder, "profile", False)
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
    others = {"environment", "download", "tokenize", "verify", "overfit", "parity", "benchmark", "trial", "report"}
    assert stages_that_ran(first_run) == others | {f"train@{level}" for level in LEVELS}


def test_what_can_run_here_is_trained_and_the_speed_levels_agree(first_run, clone):
    found = {level: read_metrics(clone, f"levels/{level}") for level in LEVELS}
    for level_metrics in found.values():
        assert set(level_metrics) == {"status", "reason", "note", "environment", *metrics.MEASURED}
    trained = {level for level in LEVELS if found[level]["status"] == "trained"}
    assert trained >= {"untied", "tied", "init", "fp32", "tf32"}  # the others need a compiler, or bf16
    assert found["tf32"]["note"]
    assert (found["fp32"]["float32_matmul_precision"], found["tf32"]["float32_matmul_precision"]) == ("ieee", "tf32")
    parity = json.loads((clone / "results/parity.json").read_text())
    assert set(parity["levels"]) == trained - {"untied", "tied", "init"}
    assert all(len(agreement["differences"]) == 4 for agreement in parity["levels"].values())
    assert set(parity["levels"]["tf32"]["differences"]) == {0.0}  # it has no effect on a CPU
    assert any(parity["levels"]["padded"]["differences"])
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


def test_the_benchmark_measures_what_agrees_and_the_report_shows_it(first_run, clone):
    benchmark, gains = (json.loads((clone / f"results/{name}.json").read_text()) for name in ("benchmark", "gains"))
    parity = json.loads((clone / "results/parity.json").read_text())
    assert list(gains["levels"]) == benchmark["levels"] == list(parity["levels"])
    assert [sorted(one["order"]) for one in benchmark["rounds"]] == [sorted([*benchmark["levels"], "control"])] * 6
    assert all(found["mfu"] > 0 for found in gains["levels"].values())
    bf16 = gains["levels"]["bf16"]["over_previous"]
    gain = f"[{bf16['low']:.2f}, {bf16['high']:.2f}]"  # before it stands the ratio, or "no measurable gain"
    for page in ("ladder.md", "ladder.html"):
        assert gain in (clone / "results/report" / page).read_text()


def test_every_training_has_a_run_of_its_own(first_run, clone):
    trained = [level for level in LEVELS if read_metrics(clone, f"levels/{level}")["status"] == "trained"]
    assert wandb_runs(clone) == len(trained) + 3  # overfit, trial and the summary


def test_nothing_untracked_is_left_behind(first_run, clone):
    assert call(clone, "git", "status", "--porcelain") == ""


def test_a_second_run_runs_nothing_but_the_environment(first_run, clone):
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}


def test_a_longer_benchmark_stays_until_something_changes(first_run, clone):
    (clone / ".venv").mkdir(exist_ok=True)
    (clone / ".venv/installed").touch()  # what make needs is on PATH already
    call(clone, "make", "benchmark", "ROUNDS=7")
    assert json.loads((clone / "results/gains.json").read_text())["rounds"] == 7
    assert stages_that_ran(call(clone, "dvc", "repro")) == {"environment"}
    get_back(clone)


def test_plots_are_a_page_that_loads_nothing(first_run, clone):
    (clone / ".venv").mkdir(exist_ok=True)
    (clone / ".venv/installed").touch()
    call(clone, "make", "plots")
    page = (clone / "dvc_plots/index.html").read_text()
    assert 'src="http' not in page
    assert "vegaEmbed" in page
    assert '"level": "padded"' in page
    assert call(clone, "git", "status", "--porcelain") == ""


def test_a_level_that_computes_something_else_stops_before_the_benchmark(first_run, clone):
    set_param(clone, "levels.bf16.init", "pytorch")
    output = call(clone, "dvc", "repro", exit_code=255)
    assert stages_that_ran(output) == {"environment", "train@bf16", "parity"}
    get_back(clone)


def test_an_experiment_runs_the_trial_alone(first_run, clone):
    output = call(clone, "dvc", "exp", "run", "-S", "precision=bf16")
    assert stages_that_ran(output) == {"environment", "trial", "report"}
    assert "precision" in call(clone, "dvc", "params", "diff")
    assert call(clone, "git", "diff", "--numstat", "params.yaml").split() == ["1", "1", "params.yaml"]  # still readable
    assert "results/trial/metrics.json" in call(clone, "dvc", "metrics", "diff")
    get_back(clone)


def test_an_experiment_in_a_temporary_copy_leaves_the_workspace_alone(first_run, clone):
    before = wandb_runs(clone)
    output = call(clone, "dvc", "exp", "run", "--temp", "-S", "attention=flash")
    assert stages_that_ran(output) == {"environment", "trial", "report"}
    assert call(clone, "git", "status", "--porcelain") == ""
    assert wandb_runs(clone) == before + 2  # trial and summary: the copy is thrown away, W&B's files are not


def test_a_sweep_runs_the_code_that_was_queued_and_ends_with_three_experiments(first_run, clone):
    sweep = ("-S", "precision=fp32,tf32,bf16", "-S", "vocab_size=50304")
    call(clone, "dvc", "exp", "run", "--queue", "--name", "sweep", *sweep)
    (clone / "pipeline/trial.py").write_text("raise SystemExit('the workspace was imported, not the snapshot')\n")
    try:
        call(clone, "dvc", "queue", "start")
        deadline = time.monotonic() + 240
        while (status := call(clone, "dvc", "queue", "status")).count("Success") < 3 and time.monotonic() < deadline:
            assert "Failed" not in status, status
            time.sleep(2)
    finally:
        call(clone, "git", "restore", "pipeline")
    assert status.count("Success") == 3, status
    shown = json.loads(call(clone, "dvc", "exp", "show", "--json"))
    revisions = [experiment["revs"][0] for commit in shown for experiment in commit["experiments"] or []]
    losses = {
        revision["data"]["params"]["params.yaml"]["data"]["precision"]: revision["data"]["metrics"][
            "results/trial/metrics.json"
        ]["data"]["loss_last"]
        for revision in revisions
        if revision["name"].startswith("sweep")
    }
    assert set(losses) == {"fp32", "tf32", "bf16"}
    assert losses["fp32"] == losses["tf32"] != losses["bf16"]  # TF32 has no effect on a CPU


def test_a_fresh_clone_trains_without_the_cache_and_does_not_with_it(first_run, clone, tmp_path):
    call(clone, "dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    call(clone, "dvc", "push")
    call(tmp_path, "git", "clone", "--quiet", str(clone), "fresh")
    fresh = tmp_path / "fresh"
    assert {f"train@{level}" for level in LEVELS} <= set(json.loads(call(fresh, "dvc", "status", "--json")))
    call(fresh, "dvc", "remote", "add", "--local", "--default", "store", str(tmp_path / "store"))
    call(fresh, "dvc", "pull")
    assert stages_that_ran(call(fresh, "dvc", "repro")) == {"environment"}


def test_a_new_level_is_one_row(first_run, clone):
    last = config.load(clone / "params.yaml").levels[LEVELS[-1]]
    set_param(clone, "levels.mine", last.model_dump() | {"compile": not last.compile})
    assert stages_that_ran(call(clone, "dvc", "repro")) == {
        *("environment", "train@mine", "parity", "benchmark", "report")
    }
    assert "| mine " in (clone / "results/report/ladder.md").read_text()
    shutil.rmtree(clone / "results/levels/mine")  # untracked, so git restore leaves it
    get_back(clone)


def test_an_edited_row_runs_that_level_alone(first_run, clone):
    set_param(clone, "levels.init.init", "pytorch")
    assert stages_that_ran(call(clone, "dvc", "repro")) == {
        *("environment", "train@init", "parity", "report")  # no quality row concerns the benchmark
    }
    get_back(clone)


def test_a_failing_level_does_not_stop_the_others_when_asked_to_keep_going(first_run, clone):
    set_param(clone, "levels.tf32.vocab_size", 4_000_000_000_000)  # fits no memory
    set_param(clone, "levels.tied.attention", "flash")
    set_param(clone, "levels.init.attention", "flash")
    ran = stages_that_ran(call(clone, "dvc", "repro", "--keep-going", exit_code=255))
    assert ran == {"environment", "train@tied", "train@init", "train@tf32"}
    assert read_metrics(clone, "levels/init")["status"] == "trained"
    get_back(clone)
