"""Two ranks learn what one process learns from the same batches, also after a rank or the job was stopped.

The ranks are real: a stage's process starts torchrun's agent, which starts two ranks that communicate with gloo.
"""

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import pipeline
from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.files import ERROR_FILE, write_json
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.running import checkpoints, following, launch
from gpt2_ladder.training import data, devices, loop, memory, ranks, runtime
from gpt2_ladder.training.metrics import Step
from helpers import trainings
from helpers.common import REPOSITORY, params_with, random_ids, tiny
from pipeline import PROBE, train, trial

STEPS = 8
TRIAL = "from pipeline import run, trial; run(trial.main)"
# put before TRIAL, so that every process runs it, the agent too; rank 1 does `action` before its nth step
FAULT = """
import os, signal, time
from gpt2_ladder.training import loop
step, calls = loop.train_step, []
def train_step(*args, **options):
    calls.append(args)
    first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if os.environ.get("RANK") == "1" and first_try and len(calls) == {nth}:
        {action}
    return step(*args, **options)
loop.train_step = train_step
"""


def prepare(folder: Path, bpe_files: tuple[Path, Path]) -> Params:
    """Prepare `folder` for a trial on two ranks of 8 rows a step; a rank takes its four rows one by one."""
    with contextlib.chdir(folder):
        document = trainings.prepare(bpe_files).model_dump()
        write_json(PROBE, {"micro_batch": 1, "without_effect": {}})
    document["devices"] = 2
    document["machines"]["cpu"] |= {"batch_size": 4, "steps": STEPS, "eval_tokens": 128}
    document["recipe"]["tokens_per_step"] = 128
    document["trial"]["cpu"]["seconds"] = 1
    return write_params(folder, document)


def write_params(folder: Path, document: dict) -> Params:
    (folder / "params.yaml").write_text(json.dumps(document))
    return Params.model_validate(document)


def run_trial(folder: Path, fault: str = "", exit_code: int = 0, wandb: str = "disabled") -> tuple[str, str]:
    """Run the trial's stage in `folder` and return its stdout and stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RANK"))}
    environment |= {"PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": wandb}
    command = [sys.executable, "-c", fault + TRIAL]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == exit_code, result.stdout + result.stderr
    return result.stdout, result.stderr


def steps(folder: Path) -> list[dict[str, float]]:
    with next(folder.glob("results/**/steps.csv")).open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def column(folder: Path, name: str) -> list[float]:
    return [step[name] for step in steps(folder)]


def metrics(folder: Path) -> dict:
    path = folder / "results/trial/facts.json"  # of the stage; trainings.train writes metrics.json
    return json.loads((path if path.exists() else folder / "results/metrics.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, bpe_files: tuple[Path, Path]) -> Path:
    """A folder in which two ranks have trained without interruption."""
    folder = tmp_path_factory.mktemp("two")
    prepare(folder, bpe_files)
    output, _ = run_trial(folder, wandb="offline")
    assert output.count(f"step   0/{STEPS}") == 1  # only rank 0 prints
    assert output.count("trial: measuring for 1 s") == 1  # after the ranks have ended
    assert metrics(folder)["measurement"]["rounds"]  # how many fit into a second depends on the machine
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert not list(folder.glob("checkpoints/trial/*"))
    return folder


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(two, tmp_path, bpe_files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    params = prepare(tmp_path, bpe_files)
    trainings.train(params.model_copy(update={"devices": 1}))
    # float32: two sums of four rows against one of eight differ by 1e-7 of a loss near 10.8, and AdamW turns 1e-7 of a
    # gradient into at most 1e-5 of a weight in so few steps
    assert column(two, "loss") == pytest.approx(column(tmp_path, "loss"), abs=1e-5)
    assert column(two, "grad_norm") == pytest.approx(column(tmp_path, "grad_norm"), rel=1e-5)
    result, expected = metrics(two), metrics(tmp_path)
    assert result["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
    assert (result["devices"], expected["devices"]) == (2, 1)
    for step in (*steps(two), result):  # tokens of both ranks
        assert step["tokens_per_second"] == pytest.approx(128 / step["step_ms"] * 1000)


@pytest.mark.slow
def test_an_overflow_on_one_rank_makes_all_ranks_skip_the_step(tmp_path, bpe_files):
    half = {"precision": "fp16", "fused_adamw": True, "trial": {"cpu": {"seconds": 0}, "gpu": {"seconds": 0}}}
    write_params(tmp_path, prepare(tmp_path, bpe_files).model_dump() | half)
    once = "lambda gradient, done=[]: gradient if done else done.append(1) or gradient * float('inf')"
    run_trial(tmp_path, FAULT.format(nth=3, action=f"next(args[0].parameters()).register_hook({once})"))
    assert [math.isfinite(norm) for norm in column(tmp_path, "grad_norm")] == [index != 2 for index in range(STEPS)]
    assert metrics(tmp_path)["skipped_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("every", "stopped", "saved"), [(1, 3, 6), (3, 4, 5)])
def test_after_sigterm_and_a_killed_rank_the_bits_are_the_same(
    two, tmp_path, bpe_files, record_property, every, stopped, saved
):
    document = prepare(tmp_path, bpe_files).model_dump() | {"checkpoint_every": every}
    write_params(tmp_path, document)
    # the agent passes the signal on to both ranks; rank 1 waits for it
    terminate = FAULT.format(nth=4, action="os.kill(os.getppid(), signal.SIGTERM); time.sleep(1)")
    _, errors = run_trial(tmp_path, terminate, exit_code=1)
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: trial: stopped by SIGTERM after step {stopped}; the next run resumes from the ")
    assert error.endswith(f"{stopped + 1:08}.pt")

    write_params(tmp_path, document)
    kill = FAULT.format(nth=7 - stopped, action="os.kill(os.getpid(), signal.SIGKILL)")
    output, _ = run_trial(tmp_path, kill)
    # the start, and the restart of both ranks after rank 1 died in step 7
    resumed = [line.split(" from ")[0] for line in output.splitlines() if "resuming" in line]
    assert resumed == [f"trial: resuming after step {step}" for step in (stopped, saved)]
    assert f"resumed after step {saved}: times" in metrics(tmp_path)["note"]
    assert column(tmp_path, "loss") == column(two, "loss")
    weights = "models/trial/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (two / weights).read_bytes()
    record_property("tried", 2)


def test_a_signal_to_any_rank_stops_all_ranks(monkeypatch):
    saved: list[list[Step]] = []
    tracker = SimpleNamespace(log=lambda step: None)
    kept = SimpleNamespace(every=100, save=saved.append, newest=lambda: None)
    job, course = trial.make_job(params_with()), checkpoints.Course(10)

    def steps():
        """Yield steps as loop.train does: step 1 has started when step 0 is read."""
        for index in range(5):
            yield Step(index, 3.0, 1.0, 1.0, 1.0, 4, 1.0)
            following.settle(index + 2, job, course, kept, 0)

    monkeypatch.setattr(ranks, "gather", lambda value: [value, ["SIGTERM"]])
    with pytest.raises(UserError, match="trial: stopped by SIGTERM after step 1"):
        following.follow(steps(), tracker, job, course, saved=kept)
    assert [len(steps) for steps in saved] == [2]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ranks_that_see_different_checkpoints_do_not_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "gather", lambda value: [value, "00000004.pt"])
    model = GPT(tiny())
    batches = data.Batches(np.arange(9, dtype="<u2"), 1, 4)
    saved = checkpoints.Checkpoints(
        "trial", {}, model, torch.optim.SGD(model.parameters()), batches, 2, checkpoints.Course(4)
    )
    with pytest.raises(UserError, match="ranks see different checkpoints; share this folder between all machines"):
        saved.load()


def test_a_rank_that_runs_out_of_memory_does_not_take_fewer_rows_alone(monkeypatch):
    def step(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    message = r"out of memory on rank 1 with 4 rows at a time \(CUDA out of memory\); lower machines\.\*\.batch_size"
    with pytest.raises(UserError, match=message):
        memory.within_memory(step, 4, torch.device("cpu"))


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name in launch.TORCHRUN:
        monkeypatch.setenv(name, str(count if name.endswith("_SIZE") else rank))


def test_an_error_of_the_user_on_a_rank_is_printed_once_and_not_retried(tmp_path, monkeypatch):
    def fail() -> None:
        raise UserError("too little memory")

    def start_ranks(*_: object) -> None:
        """Do what torchrun does: start a rank, and start it again when it has failed."""
        with monkeypatch.context() as patched:
            as_rank(patched, rank=1, count=2)
            with pytest.raises(SystemExit) as first:
                pipeline.run(fail)
            with pytest.raises(SystemExit) as second:
                launch.on_ranks(2, "cpu")
        assert (first.value.code, second.value.code) == (1, 0)

    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # restored after the test
    monkeypatch.setattr(launch, "elastic_launch", lambda *_: start_ranks)
    with pytest.raises(UserError, match=r"^too little memory$"):
        launch.on_ranks(2, "cpu")
    assert ERROR_FILE not in os.environ


def test_a_quality_level_trains_on_one_device():
    shape = params_with().machines["cpu"].model_copy(update={"batch_size": 4})
    params = params_with(devices=2, machines={"cpu": shape})
    assert [train.make_job(params, name).devices for name in ("untied", "fp32")] == [1, 2]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_token_goes_to_exactly_one_rank(count):
    shard = np.arange(4 * 8 * 6 + 1, dtype=np.uint16)  # each token is its position in the text
    shares = [data.local_rows(data.concatenate(data.Batches(shard, 4, 8), 2), rank, count) for rank in range(count)]
    for step in range(3):
        xs, ys = zip(*map(next, shares), strict=True)
        # a step has 64 tokens
        assert sorted(torch.cat(xs).flatten().tolist()) == list(range(64 * step, 64 * (step + 1)))
        assert torch.equal(torch.cat(ys), torch.cat(xs) + 1)
        assert {len(x) for x in xs} == {8 // count}


def test_gradients_are_sent_with_the_last_rows_only():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model, sent = GPT(tiny()), []
        parallel = DistributedDataParallel(model)

        def send(_: object, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            sent.append(bucket.index())
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        parallel.register_comm_hook(None, send)
        batch, autocast = (random_ids(4), random_ids(4, seed=1)), runtime.set_precision("fp32", torch.device("cpu"))
        for micro_batch in (4, 1):
            sent.clear()
            loop.accumulate(parallel, batch, autocast, torch.device("cpu"), micro_batch)
            assert sent == sorted(set(sent)) != []  # each bucket once
    finally:
        ranks.leave()
    assert ranks.average_gradients(model) is model  # a single process needs no wrapper


def test_more_devices_than_the_machine_has_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices.check_count("cuda", 2)
    with pytest.raises(UserError, match="devices = 8, but this machine has 2 GPUs: set devices: 2, or start the ranks"):
        launch.on_ranks(8, "cuda")


def test_torchrun_must_start_as_many_ranks_as_train(monkeypatch):
    as_rank(monkeypatch, rank=0, count=16)
    assert launch.on_ranks(16, "cpu") is False
    with pytest.raises(UserError, match="torchrun started 16 ranks, but this training uses 1: set `devices` in params"):
        launch.on_ranks(1, "cpu")


def test_a_variable_that_torchrun_did_not_set_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^RANK is set, but WORLD_SIZE is missing or invalid; unset RANK or use"):
        launch.on_ranks(1, "cpu")
    missing = ", ".join(name for name in launch.TORCHRUN if name != "RANK")
    with pytest.raises(UserError, match=rf"^RANK is set, but {missing} is missing or invalid"):
        launch.on_ranks(2, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.on_ranks(1, "cpu") is False


def test_a_batch_that_cannot_be_split_is_refused(tmp_path):
    document = params_with().model_dump() | {"devices": 3}
    (tmp_path / "params.yaml").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"devices = 3: must divide machines\.cpu\.batch_size \(2\)"):
        params_yaml.load(tmp_path / "params.yaml")
