"""Experiments under real DVC: a queue with two workers, and a level that fails."""

import hashlib
import json
import time

import pytest

from helpers.climbing import call, get_back, read_metrics, set_param, stages_that_ran, wandb_runs

pytestmark = pytest.mark.slow


def test_two_queue_workers_run_the_queued_code_and_keep_the_shared_cache_whole(first_run, clone):
    before = wandb_runs(clone)
    # with another source of weights, so that each experiment also downloads and verifies
    sweep = ("-S", "precision=fp32,bf16", "-S", "vocab_size=50304", "-S", "pretrained.source=stand-in")
    call(clone, "dvc", "exp", "run", "--queue", "--name", "sweep", *sweep)
    (clone / "pipeline/trial.py").write_text("raise SystemExit('the workspace was imported, not the snapshot')\n")
    # a worker inherits the output of the command that starts it: a pipe would stay open until the queue is empty
    quietly = ("sh", "-c", '"$@" > /dev/null 2>&1', "sh")
    try:
        call(clone, *quietly, "dvc", "queue", "start")
        deadline = time.monotonic() + 240
        while "1 active" not in (status := call(clone, "dvc", "queue", "status")) and time.monotonic() < deadline:
            time.sleep(0.5)
        call(clone, *quietly, "dvc", "queue", "start", "-j", "2")
        while (status := call(clone, "dvc", "queue", "status")).count("Success") < 2 and time.monotonic() < deadline:
            assert "Failed" not in status, status
            time.sleep(4)
    finally:
        call(clone, "git", "restore", "pipeline")
    assert status.count("Success") == 2, status
    for worker in (1, 2):
        assert "succeeded in" in (clone / f".dvc/tmp/exps/celery/dvc-exp-worker-{worker}.out").read_text()
    shown = json.loads(call(clone, "dvc", "exp", "show", "--json"))
    revisions = [experiment["revs"][0] for commit in shown for experiment in commit["experiments"] or []]
    losses = {
        revision["data"]["params"]["params.yaml"]["data"]["precision"]: revision["data"]["metrics"][
            "results/trial/metrics.json"
        ]["data"]["loss"]
        for revision in revisions
        if revision["name"].startswith("sweep")
    }
    assert set(losses) == {"fp32", "bf16"}
    assert losses["fp32"] != losses["bf16"]
    cached = [path for path in (clone / ".dvc/cache/files/md5").glob("??/*") if path.suffix != ".dir"]
    assert len(cached) > 20
    for path in cached:
        assert hashlib.md5(path.read_bytes()).hexdigest() == path.parent.name + path.name
    assert call(clone, "git", "status", "--porcelain") == ""
    assert (
        wandb_runs(clone) == before + 2
    )  # a trial each, kept although DVC deletes its copies; the benchmark did not run


def test_keep_going_runs_the_other_levels_when_one_fails(first_run, clone):
    set_param(clone, "levels.init.vocab_size", 4_000_000_000_000)  # fits no memory
    set_param(clone, "levels.fp32.attention", "flash")
    ran = stages_that_ran(call(clone, "dvc", "repro", "-k", exit_code=255))
    assert ran == {"environment", "probe", "train@init", "train@fp32", "trial"}
    assert read_metrics(clone, "levels/fp32")["status"] == "trained"
    get_back(clone)
