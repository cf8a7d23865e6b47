"""A training that was killed or stopped resumes, and ends with the same bits as one that nothing interrupted."""

import hashlib
import json
import os
import random
import signal
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.running import checkpoints
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import data, loop, runtime
from gpt2_ladder.training.metrics import Step
from helpers.common import tiny
from helpers.trainings import train

KILLS = 15
KEEP = partial(hub_format.save_gpt, folder=Path("model"))
Result = tuple[list[str], bytes]


def result() -> Result:
    """Return what a training has written: every step's columns without the times, and the network's bytes."""
    rows = [line.split(",") for line in Path("results/steps.csv").read_text().splitlines()]
    return [",".join(row[:2] + row[4:6]) for row in rows], Path("model/model.safetensors").read_bytes()


@pytest.fixture
def undisturbed(params: Params) -> Result:
    train(params.model_copy(update={"checkpoint_every": None}), keep=KEEP)
    steps, network = result()
    assert len(steps) == 13  # the header and 12 steps
    return steps, network


def train_in_a_fork(params: Params) -> int:
    """Start a training in a copy of this process, which has already imported torch, and return the copy's pid."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train(params, keep=KEEP)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
def test_a_killed_training_resumes_with_the_same_bits(params, undisturbed, record_property):
    start = time.perf_counter()
    assert os.waitpid(train_in_a_fork(params), 0)[1] == 0
    whole_s = time.perf_counter() - start
    assert result() == undisturbed
    generator, kills, ends, resumed = random.Random(7), 0, 0, 0
    # a kill before the first checkpoint proves little, so enough of them must come later
    while kills < KILLS or resumed <= KILLS / 4 or not ends:
        resumed += any(Path("checkpoints").glob("trial/*/*.pt"))
        pid = train_in_a_fork(params)
        if kills < KILLS or resumed <= KILLS / 4:
            time.sleep(generator.uniform(0, whole_s))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        ends += 1
        assert status == 0
        assert result() == undisturbed
        assert not list(Path("checkpoints").glob("trial/*"))  # a finished training leaves none
        for path in (Path("results/steps.csv"), Path("model/model.safetensors")):
            path.unlink()
    record_property("tried", kills)


@pytest.mark.parametrize(("every", "last"), [(1, 3), (3, 4), (100, 3)])  # 3: step 4 starts before step 3 is read
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves_a_checkpoint(params, undisturbed, monkeypatch, number, every, last):
    step, calls = loop.train_step, []

    def train_step(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", train_step)
    params = params.model_copy(update={"checkpoint_every": every})
    message = rf"trial: stopped by {number.name} after step {last}; the next run resumes from .* checkpoints/"
    with pytest.raises(UserError, match=message):
        train(params, keep=KEEP)
    assert len(list(Path("checkpoints").glob("trial/*/*"))) == 1
    train(params, keep=KEEP)
    assert f"resumed after step {last}: times" in json.loads(Path("results/metrics.json").read_text())["note"]
    assert len(calls) == 12
    assert result() == undisturbed


@pytest.mark.parametrize("every", [1, 3])
def test_a_checkpoint_has_the_weights_after_its_last_step(params, monkeypatch, every):
    """A step that is launched before the checkpoint is saved would change them."""
    after, saved = list[torch.Tensor](), dict[int, torch.Tensor]()
    step, save = loop.train_step, checkpoints.Checkpoints.save

    def train_step(model, *args, **options):
        out = step(model, *args, **options)
        after.append(model.wte.weight.detach().clone())
        return out

    def noted(self, steps):
        saved[len(steps)] = self.model.wte.weight.detach().clone()
        save(self, steps)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(checkpoints.Checkpoints, "save", noted)
    train(params.model_copy(update={"checkpoint_every": every}))
    assert [*saved] == list(range(every, 13, every))
    assert all(torch.equal(weight, after[steps - 1]) for steps, weight in saved.items())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("nan_at", [5, 6])  # step 5 is the last before a checkpoint after every third
def test_nothing_is_saved_from_a_step_that_is_not_finite_on(params, monkeypatch, every, nan_at):
    step, calls = loop.train_step, []

    def train_step(*args, **options):
        calls.append(args)
        loss, norm = step(*args, **options)
        return (loss, norm * float("nan")) if len(calls) > nan_at else (loss, norm)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(UserError, match=f"trial: at step {nan_at} the loss is .* and the gradient's norm nan"):
        train(params.model_copy(update={"checkpoint_every": every}))
    (path,) = Path("checkpoints").glob("trial/*/*.pt")
    assert path.stem == f"{nan_at // every * every:08}"


@pytest.mark.parametrize("every", [1, 3])
def test_a_training_that_ran_out_of_memory_resumes_with_the_same_bits(params, monkeypatch, every):
    step, calls, stop_at = loop.train_step, [], 0

    def train_step(*args, **options):
        calls.append(args)
        if len(calls) == 5:  # step 4 does not fit with both rows
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", train_step)
    train(params.model_copy(update={"checkpoint_every": None}), keep=KEEP)
    expected = result()
    assert [row.split(",")[3] for row in expected[0][1:]] == 4 * ["2"] + 8 * ["1"]
    calls.clear()
    stop_at = 9
    params = params.model_copy(update={"checkpoint_every": every})
    with pytest.raises(UserError, match="trial: stopped by SIGTERM"):
        train(params, keep=KEEP)
    train(params, keep=KEEP)
    assert result() == expected


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_in_float16_resumes_with_its_scale(params, monkeypatch, fused):
    """The first steps overflow. A scale that started again at its first value would make more of them do so."""
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=2.0**20, growth_interval=3)
    monkeypatch.setattr(runtime, "make_scaler", lambda *_: scaler())
    half = {"precision": "fp16", "fused_adamw": fused}
    train(params.model_copy(update={**half, "checkpoint_every": None}), keep=KEEP)
    expected, step, calls = result(), loop.train_step, []
    skipped = json.loads(Path("results/metrics.json").read_text())["skipped_steps"]
    assert [row.split(",")[2] in ("inf", "nan") for row in expected[0][1:3]] == [True, True]
    assert 2 <= skipped < 12

    def train_step(*args, **options):
        calls.append(args)
        if len(calls) in (2, 8):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", train_step)
    for last in (1, 7):
        with pytest.raises(UserError, match=f"trial: stopped by SIGTERM after step {last};"):
            train(params.model_copy(update={**half, "checkpoint_every": 2}), keep=KEEP)
    train(params.model_copy(update={**half, "checkpoint_every": 2}), keep=KEEP)
    assert result() == expected
    assert json.loads(Path("results/metrics.json").read_text())["skipped_steps"] == skipped
    assert len(calls) == 12


def test_the_random_generator_resumes_where_it_stopped(tmp_path, monkeypatch):
    """No level draws random numbers while it trains: only a network with dropout would show a mistake."""
    monkeypatch.chdir(tmp_path)
    model = GPT(tiny())
    batches = data.Batches(np.arange(9, dtype="<u2"), 1, 4)
    saved = checkpoints.Checkpoints(
        "any", {}, model, torch.optim.AdamW(model.parameters()), batches, 1, checkpoints.Course(9)
    )
    saved.save([Step(0, 4.6, 1.0, 1.0, 1.0, 2, 1.0)])
    drawn = torch.rand(4)
    torch.manual_seed(0)
    saved.load()
    assert torch.equal(torch.rand(4), drawn)


@pytest.fixture
def state(params: Params, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train until the loss is NaN at step 5, and return the checkpoint."""
    step, calls = loop.train_step, []

    def train_step(*args, **options):
        calls.append(args)
        loss, *rest = step(*args, **options)
        return loss * float("nan") if len(calls) > 5 else loss, *rest

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", train_step)
        with pytest.raises(UserError, match="trial: at step 5 the loss is nan") as caught:
            train(params)
    (path,) = Path("checkpoints").glob("trial/*/*.pt")
    assert str(caught.value).endswith(f"the next run resumes from the last good checkpoint, {path}")
    return path


def test_a_loss_that_is_not_finite_is_never_saved(state):
    assert state.name == "00000004.pt"


def test_a_checkpoint_of_the_format_before_is_named_as_ignored_and_stays(params, state, capsys):
    settings = json.dumps(torch.load(state)["settings"], sort_keys=True)
    older = state.parent.with_name(hashlib.sha256(settings.encode()).hexdigest()[:12])  # where it would have been
    state.parent.rename(older)
    train(params)
    assert f"trial: ignoring {older}" in capsys.readouterr().out
    assert (older / state.name).exists()


def test_a_checkpoint_with_other_settings_is_ignored_and_stays(params, state, capsys):
    train(params.model_copy(update={"seed": 1}))
    assert f"trial: ignoring {state.parent}, which has other settings" in capsys.readouterr().out
    assert state.exists()
    train(params)
    assert "trial: resuming after step 3" in capsys.readouterr().out


DAMAGES = ("a bit of a weight", "a bit of the state", "a bit of the directory", "cut", "empty", "text", "code")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_fix(params, state, damage):
    raw = bytearray(state.read_bytes())
    with zipfile.ZipFile(state) as archive:  # what torch writes
        records = sorted(archive.infolist(), key=lambda info: info.file_size)
    if damage.endswith("directory"):  # a record becomes a folder, whose content torch does not read
        raw[raw.rfind(b"PK\x01\x02", 0, raw.rfind(records[-1].filename.encode())) + 38] ^= 0x10
        state.write_bytes(raw)
    elif damage.startswith("a bit"):
        info = records[-1] if damage.endswith("weight") else next(i for i in records if i.filename.endswith("data.pkl"))
        raw[raw.index(info.filename.encode()) + info.file_size // 2] ^= 1
        state.write_bytes(raw)
    elif damage == "code":
        torch.save({"settings": print}, state)  # a name that torch would import
    else:
        state.write_bytes({"cut": raw[:-1], "empty": b"", "text": b"{}"}[damage])
    fix = rf"remove {state.parent} to train from the start"
    with pytest.raises(UserError, match=rf"^{state}: the checkpoint is damaged \([^\n]+\); {fix}$"):
        train(params)


def test_memory_that_runs_out_is_no_fault_of_the_checkpoint(params, state, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(MemoryError("too large")))
    with pytest.raises(MemoryError, match="too large"):
        train(params)
    assert state.exists()


def test_a_half_written_checkpoint_is_ignored_and_removed(params, state):
    (state.parent / ".writing-x").mkdir()
    (state.parent / ".writing-x/00000009.pt").write_bytes(b"half")
    train(params)
    assert len(Path("results/steps.csv").read_text().splitlines()) == 13
    assert not list(checkpoints.FOLDER.glob("trial/*"))
