"""Experiments of the real pipeline under real DVC: alone, in a copy, queued, and with a level that fails."""

import hashlib
import json
import time

import pytest

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from helpers.climbing import call, get_back, read_metrics, set_param, stages_that_ran, wandb_runs
from helpers.common import REPOSITORY
from helpers.memory import Capped
from pipeline.train import train

LEVELS = list(params_yaml.load(REPOSITORY / "params.yaml").levels)


def test_an_experiment_runs_the_trial_alone(first_run, clone):
    output = call(clone, "dvc", "exp", "run", "-S", "precision=bf16")
    assert "warning: " not in output
    assert stages_that_ran(output) == {"environment", "trial", "report"}
    assert "precision" in call(clone, "dvc", "params", "diff")
    assert call(clone, "git", "diff", "--numstat", "params.yaml").split() == ["1", "1", "params.yaml"]  # still readable
    assert "results/trial/metrics.json" in call(clone, "dvc", "metrics", "diff")
    get_back(clone)


def test_an_experiment_in_a_temporary_copy_leaves_the_workspace_alone(first_run, clone):
    before = wandb_runs(clone)
    output = call(clone, "dvc", "exp", "run", "--temp", "-S", "attention=flash")
    assert "warning: " not in output
    assert stages_that_ran(output) == {"environment", "trial", "report"}
    assert call(clone, "git", "status", "--porcelain") == ""
    assert wandb_runs(clone) == before + 2  # trial and summary: the copy is thrown away, W&B's files are not


def test_a_sweep_of_two_workers_runs_the_code_that_was_queued_and_leaves_the_shared_cache_whole(first_run, clone):
    # another source of weights, so that each downloads and verifies, too
    sweep = ("-S", "precision=fp32,tf32,bf16", "-S", "vocab_size=50304", "-S", "pretrained.source=stand-in")
    call(clone, "dvc", "exp", "run", "--queue", "--name", "sweep", *sweep)
    (clone / "pipeline/trial.py").write_text("raise SystemExit('the workspace was imported, not the snapshot')\n")
    # a worker holds on to the output of the command that started it: a pipe would be open until the queue is empty
    quietly = ("sh", "-c", '"$@" > /dev/null 2>&1', "sh")
    try:
        call(clone, *quietly, "dvc", "queue", "start")
        deadline = time.monotonic() + 240
        while "1 active" not in (status := call(clone, "dvc", "queue", "status")) and time.monotonic() < deadline:
            time.sleep(0.2)
        call(clone, *quietly, "dvc", "queue", "start", "-j", "2")
        while (status := call(clone, "dvc", "queue", "status")).count("Success") < 3 and time.monotonic() < deadline:
            assert "Failed" not in status, status
            time.sleep(2)
    finally:
        call(clone, "git", "restore", "pipeline")
    assert status.count("Success") == 3, status
    for worker in (1, 2):
        assert "succeeded in" in (clone / f".dvc/tmp/exps/celery/dvc-exp-worker-{worker}.out").read_text()
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
    cached = [path for path in (clone / ".dvc/cache/files/md5").glob("??/*") if path.suffix != ".dir"]
    assert len(cached) > 20
    for path in cached:
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name
    assert call(clone, "git", "status", "--porcelain") == ""


def test_a_failing_level_does_not_stop_the_others_when_asked_to_keep_going(first_run, clone):
    set_param(clone, "levels.tied.vocab_size", 4_000_000_000_000)  # fits no memory
    set_param(clone, "levels.init.attention", "flash")
    ran = stages_that_ran(call(clone, "dvc", "repro", "--keep-going", exit_code=255))
    assert ran == {"environment", "probe", "train@tied", "train@init"}
    assert read_metrics(clone, "levels/init")["status"] == "trained"
    get_back(clone)


def test_a_stage_that_runs_out_of_memory_goes_on_with_half_and_says_so(clone, tmp_path, monkeypatch):
    monkeypatch.chdir(clone)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    params = params_yaml.load()
    fp32 = params.levels["fp32"]
    with Capped(float("inf")) as memory:
        train(params, "fp32", "train", fp32, "speed", tmp_path / "whole")
    with Capped(memory.peak - 2**20):
        train(params, "fp32", "train", fp32, "speed", tmp_path / "halved")
    whole, halved = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "halved"))
    assert (whole["micro_batch"], halved["micro_batch"]) == (2, 1)
    assert halved["loss_last"] == pytest.approx(whole["loss_last"], abs=1e-4)
    assert halved["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-4)


def test_a_stage_that_cannot_go_on_leaves_no_result(clone, tmp_path, monkeypatch):
    monkeypatch.chdir(clone)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    params = params_yaml.load()
    # the weights, 13 MB, fit, twice while they are drawn; one row's logits and their logarithms do not
    with Capped(30e6), pytest.raises(UserError, match="out of memory with one row at a time"):
        train(params, "fp32", "train", params.levels["fp32"], "speed", tmp_path / "failed")
    assert [path.name for path in (tmp_path / "failed").iterdir()] == ["steps.csv"]
    assert len((tmp_path / "failed" / "steps.csv").read_text().splitlines()) == 1  # its head
