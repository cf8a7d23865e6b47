"""Several ranks against one process: the same batch, the same curve; and what happens when a rank or the job is killed.

The ranks are real: a stage's process starts torchrun's agent, which starts two more, on gloo.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.model import GPT
from gpt2_ladder.running import checkpoints, launch
from gpt2_ladder.running import run as run_module
from gpt2_ladder.training import data, devices, loop, ranks, runtime
from gpt2_ladder.training.metrics import Step
from helpers.common import REPOSITORY, random_ids, tiny
from pipeline import ENCODER_JSON, ENVIRONMENT, PROBE, TRAIN_SHARD, VAL_SHARD, environment, trial

STEPS = 8
pytestmark = pytest.mark.slow
# Every process runs this, the agent too; what is put before it goes wrong in one of them.
TRIAL = "from pipeline import run, trial; run(trial.main)"
BEFORE = """
import os, signal, time, torch
from gpt2_ladder.training import loop
rank, first_try = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
step, taken = loop.train_step, 0
def train_step(*arguments, **options):
    global taken
    taken += 1
    if rank == "1" and first_try and taken == 6:
        {}
    return step(*arguments, **options)
loop.train_step = train_step
"""


def prepare(folder: Path, bpe_files: tuple[Path, Path], **changes: object) -> None:
    """Fill `folder` with what the trial of a tiny model needs, its text random; 8 rows a step, a checkpoint every 2."""
    write_json(folder / ENVIRONMENT, {**environment.describe().model_dump(), "threads": 2})
    write_json(folder / PROBE, {"micro_batch": 1})  # a rank takes its four rows one by one
    for shard, seed in ((TRAIN_SHARD, 0), (VAL_SHARD, 1)):
        (folder / shard).parent.mkdir(exist_ok=True)
        data.write_shard(folder / shard, np.random.default_rng(seed).integers(0, 50257, 2000).tolist())
    (folder / ENCODER_JSON).parent.mkdir()
    (folder / ENCODER_JSON).symlink_to(bpe_files[1])
    document = params_yaml.load(REPOSITORY / "params.yaml").model_dump()
    document |= {"model": "tiny", "checkpoint_every": 2, "devices": 2, **changes}
    document["models"]["tiny"] |= {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    shape = {"batch_size": 4, "block_size": 16, "steps": STEPS, "eval_tokens": 128}
    document["machines"]["cpu"] |= shape
    document["quality"] |= {**shape, "steps": 6}
    document["recipe"] |= {"clip_norm": 1.0, "tokens_per_step": 128}
    (folder / "params.yaml").write_text(json.dumps(document))


def run(
    folder: Path, before: str = "", command: str = TRIAL, exit_code: int = 0, wandb: str = "disabled"
) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RANK"))}
    variables |= {"PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"WANDB_MODE": wandb}
    result = subprocess.run(
        [sys.executable, "-c", before + command], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == exit_code, result.stdout + result.stderr
    return result


def steps(folder: Path) -> list[dict[str, str]]:
    with (folder / "results/trial/steps.csv").open() as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[float]:
    return [float(step[name]) for step in steps(folder)]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "results/trial/metrics.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, bpe_files: tuple[Path, Path]) -> Path:
    """A folder in which two ranks have trained, undisturbed."""
    folder = tmp_path_factory.mktemp("two")
    prepare(folder, bpe_files)
    printed = run(folder, wandb="offline").stdout
    assert printed.count(f"step   0/{STEPS}") == 1  # of one rank
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    return folder


def test_two_ranks_learn_what_one_process_learns_from_the_same_batches(two, tmp_path, bpe_files):
    prepare(tmp_path, bpe_files, devices=1)
    run(tmp_path)
    # float32: a rank sums its four rows, then both are summed, where one process sums eight; 1e-7 of a loss near 10.8,
    # and AdamW makes of 1e-7 of a gradient at most 1e-5 of a weight in so few steps
    assert column(two, "loss") == pytest.approx(column(tmp_path, "loss"), abs=1e-5)
    assert column(two, "grad_norm") == pytest.approx(column(tmp_path, "grad_norm"), rel=1e-5)
    several, one = metrics(two), metrics(tmp_path)
    assert several["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
    assert (several["devices"], one["devices"]) == (2, 1)
    for step in steps(two):  # of the whole batch
        assert float(step["tokens_per_second"]) == pytest.approx(128 / float(step["step_ms"]) * 1000)
    assert several["tokens_per_second"] == pytest.approx(128 / several["step_ms"] * 1000)
    assert not list(two.glob("checkpoints/trial/*"))


def same_as(folder: Path, undisturbed: Path) -> bool:
    """Tell whether the two trainings ended with the same bits."""
    return (
        column(folder, "loss") == column(undisturbed, "loss")
        and (folder / "models/trial/model.safetensors").read_bytes()
        == (undisturbed / "models/trial/model.safetensors").read_bytes()
    )


def test_a_killed_rank_is_restarted_and_all_go_on_from_the_last_checkpoint(two, tmp_path, bpe_files):
    prepare(tmp_path, bpe_files)
    result = run(tmp_path, BEFORE.format("os.kill(os.getpid(), signal.SIGKILL)"))
    assert result.stdout.count("trial: resuming after step 3, from checkpoints/") == 1  # killed in the one with index 5
    assert "resumed after step 3: times" in metrics(tmp_path)["note"]
    assert same_as(tmp_path, two)


def test_sigterm_to_the_stage_ends_the_step_of_all_ranks_saves_and_stops(two, tmp_path, bpe_files):
    prepare(tmp_path, bpe_files, checkpoint_every=100)
    # rank 1 waits for the signal to come, from the agent, to itself: rank 0 has it or gets it
    before = BEFORE.format("os.kill(os.getppid(), signal.SIGTERM); time.sleep(1)")
    lines = run(tmp_path, before, exit_code=1).stderr.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error.startswith("error: trial: stopped by SIGTERM after step 5; the next run resumes from the last good ")
    assert error.endswith("00000006.json")
    assert "trial: resuming after step 5" in run(tmp_path).stdout
    assert same_as(tmp_path, two)


def test_a_signal_to_any_rank_stops_all(monkeypatch):
    class Kept:  # what a Tracker and Checkpoints are asked for
        every, saved = 100, 0

        def log(self, step: Step) -> None:
            pass

        def save(self, steps: list[Step]) -> None:
            self.saved += 1

        def newest(self) -> None:
            pass

    job = trial.make_job(params_yaml.load(REPOSITORY / "params.yaml"))
    kept, steps = Kept(), (Step(index, 3.0, 1.0, 1.0, 1.0, 4) for index in range(5))
    monkeypatch.setattr(ranks, "gather", lambda value: [value, ["SIGTERM"]])
    with pytest.raises(UserError, match="trial: stopped by SIGTERM after step 0"):
        run_module.follow(steps, kept, job, saved=kept)
    assert kept.saved == 1


def test_ranks_that_see_different_checkpoints_do_not_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "gather", lambda value: [value, "00000004.json"])
    model = GPT(tiny())
    batches = data.Batches(np.arange(9, dtype="<u2"), 1, 4)
    saved = checkpoints.Checkpoints("trial", {}, model, torch.optim.SGD(model.parameters()), batches, 2)
    with pytest.raises(UserError, match="not every rank sees the same checkpoint; let all machines share the folder"):
        saved.load()


def test_what_only_the_user_can_mend_ends_all_ranks_with_one_line_and_is_not_tried_again(tmp_path, bpe_files):
    prepare(tmp_path, bpe_files, checkpoint_every=None)
    failing = """def accumulate(*_): raise torch.OutOfMemoryError("CUDA out of memory")
        loop.accumulate = accumulate"""
    result = run(tmp_path, BEFORE.format(failing), exit_code=1)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error == (
        "error: out of memory on rank 1 with 1 rows at a time (CUDA out of memory); lower machines.*.batch_size"
    )
    assert result.stdout.count(f"step   0/{STEPS}") == 1
    assert not (tmp_path / "results/trial/metrics.json").exists()


def test_a_quality_level_trains_on_one_device(tmp_path, bpe_files):
    prepare(tmp_path, bpe_files)
    run(tmp_path, command="from pipeline import run, train; run(train.main, 'untied')")
    assert json.loads((tmp_path / "results/levels/untied/metrics.json").read_text())["devices"] == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_token_goes_to_exactly_one_rank(count):
    shard = np.arange(4 * 8 * 6 + 1, dtype=np.uint16)  # each token its own place in the text
    of_ranks = []
    for rank in range(count):
        batches = data.concatenate(data.Batches(shard, 4, 8), 2)
        share = data.local_rows(batches, rank, count)
        of_ranks.append([next(share) for _ in range(3)])
    for step in range(3):
        x, y = (torch.cat([share[step][which] for share in of_ranks]) for which in (0, 1))
        # the whole of one step's 64 tokens, each once
        assert sorted(x.flatten().tolist()) == list(range(64 * step, 64 * (step + 1)))
        assert torch.equal(y, x + 1)
        assert {len(share[step][0]) for share in of_ranks} == {8 // count}


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
    assert ranks.average_gradients(model) is model  # alone, nothing is wrapped


def test_devices_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices.check_count("cuda", 2)
    with pytest.raises(UserError, match="devices = 8, but this machine has 2: set devices: 2, or start the ranks"):
        launch.on_ranks(8, "cuda")


def test_torchrun_and_params_must_agree_on_how_many_train(monkeypatch):
    for name in launch.TORCHRUN:
        monkeypatch.setenv(name, "16" if name.endswith("_SIZE") else "0")
    assert launch.on_ranks(16, "cpu") is False
    with pytest.raises(UserError, match="torchrun started 16 ranks where 1 are to train"):
        launch.on_ranks(1, "cpu")


def test_what_torchrun_did_not_set_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^WORLD_SIZE: not as torchrun sets it, but RANK is set; unset RANK or use"):
        launch.on_ranks(1, "cpu")
    with pytest.raises(UserError, match=r"^WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT, MASTER_ADDR: not as"):
        launch.on_ranks(2, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.on_ranks(1, "cpu") is False


def test_a_batch_that_cannot_be_split_is_named(tmp_path, bpe_files):
    prepare(tmp_path, bpe_files, devices=3)
    with pytest.raises(UserError, match=r"devices = 3: machines\.cpu\.batch_size \(4\) must be a multiple of it"):
        params_yaml.load(tmp_path / "params.yaml")
