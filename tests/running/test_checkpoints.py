"""A training that is killed and goes on, against one that nobody disturbed: bit for bit the same."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2_ladder.config import Params, UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.running import checkpoints
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import data, loop
from gpt2_ladder.training.metrics import Step
from helpers.common import tiny
from helpers.trainings import train

KILLS = 50


def run(params: Params, **changes: object) -> None:
    """Train as the trial does, into results/ and model/."""
    params = params.model_copy(update=changes)
    keep = partial(hub_format.save_gpt, folder=Path("model"))
    train(params, keep=keep)


def in_a_fork(work: Callable[[], None]) -> int:
    """Start `work` in a copy of this process, which has torch imported already, and return its number."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        code = 0
    finally:
        os._exit(code)


def learned() -> tuple[list[str], bytes]:
    """What a training has left: every step's columns but the times, and the network's bytes."""
    rows = [line.split(",") for line in Path("results/steps.csv").read_text().splitlines()]
    return [",".join(row[:2] + row[4:]) for row in rows], Path("model/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_training_killed_at_fifty_random_moments_learns_the_same_bits(params, record_property):
    os.waitpid(in_a_fork(lambda: run(params, checkpoint_every=None)), 0)
    undisturbed = learned()
    assert len(undisturbed[0]) == 13  # titles and 12 steps
    start = time.perf_counter()
    assert os.waitpid(in_a_fork(lambda: run(params)), 0)[1] == 0
    whole_s = time.perf_counter() - start
    assert learned() == undisturbed
    dice, kills, ends, went_on = random.Random(7), 0, 0, 0
    # a kill before the first checkpoint proves little: on a busy machine there are more of them
    while kills < KILLS or went_on <= KILLS / 4 or not ends:
        went_on += bool(list(Path("checkpoints").glob("trial/*/*.json")))
        child = in_a_fork(lambda: run(params))
        if kills < KILLS or went_on <= KILLS / 4:
            time.sleep(dice.uniform(0, whole_s))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        ends += 1
        assert status == 0
        assert learned() == undisturbed
        assert not list(Path("checkpoints").glob("trial/*"))  # a training that has ended leaves none
        for path in (Path("results/steps.csv"), Path("model/model.safetensors")):
            path.unlink()
    record_property("tried", kills)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_where_it_goes_on(params, monkeypatch, number):
    os.waitpid(in_a_fork(lambda: run(params, checkpoint_every=None)), 0)
    undisturbed = learned()
    step = loop.train_step
    taken = []

    def train_step(*arguments, **options):
        taken.append(None)
        if len(taken) == 4:
            os.kill(os.getpid(), number)
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(UserError, match=rf"trial: stopped by {number.name} after step 3; .* goes on, is checkpoints"):
        run(params, checkpoint_every=100)
    assert len(list(Path("checkpoints").glob("trial/*/*"))) == 2
    run(params, checkpoint_every=100)
    assert "resumed after step 3: times" in json.loads(Path("results/metrics.json").read_text())["note"]
    assert len(taken) == 12
    assert learned() == undisturbed


def stopped_at(params: Params, monkeypatch: pytest.MonkeyPatch, steps: int) -> Path:
    """Train until after `steps` steps the network gives NaN, and return the checkpoint's JSON file."""
    step = loop.train_step
    taken = []

    def train_step(*arguments, **options):
        taken.append(None)
        loss, *rest = step(*arguments, **options)
        return loss * float("nan") if len(taken) > steps else loss, *rest

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", train_step)
        with pytest.raises(UserError) as caught:
            run(params)
    assert f"trial: at step {steps} the loss is nan" in str(caught.value)
    (state,) = Path("checkpoints").glob("trial/*/*.json")
    assert str(caught.value).endswith(f"the next run resumes from the last good checkpoint, {state}")
    return state


def test_what_is_drawn_goes_on_where_it_stood(tmp_path, monkeypatch):
    """No level draws anything while it trains: only a network with dropout would notice."""
    monkeypatch.chdir(tmp_path)
    model = GPT(tiny())
    batches = data.Batches(np.arange(9, dtype="<u2"), 1, 4)
    saved = checkpoints.Checkpoints("any", {}, model, torch.optim.AdamW(model.parameters()), batches, 1)
    saved.save([Step(0, 4.6, 1.0, 1.0, 1.0, 2)])
    drawn = torch.rand(4)
    torch.manual_seed(0)
    saved.load()
    assert torch.equal(torch.rand(4), drawn)


def test_a_loss_that_is_no_number_is_never_saved(params, monkeypatch):
    state = stopped_at(params, monkeypatch, 5)
    assert state.name == "00000004.json"


def test_a_checkpoint_of_other_settings_is_left_alone(params, monkeypatch, capsys):
    state = stopped_at(params, monkeypatch, 5)
    other = params.model_copy(update={"seed": 1})
    run(other)
    assert f"trial: {state.parent} which has other settings" in capsys.readouterr().out
    assert state.exists()
    run(params)
    assert "trial: resuming after step 3" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no json", "other"])
def test_a_damaged_checkpoint_is_refused_with_the_mend(params, monkeypatch, damage):
    state = stopped_at(params, monkeypatch, 5)
    tensors = state.with_suffix(".safetensors")
    raw = tensors.read_bytes()
    if damage == "flip":
        tensors.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "cut":
        tensors.write_bytes(raw[:-1])
    elif damage == "gone":
        tensors.unlink()
    else:
        state.write_text("{" if damage == "no json" else json.dumps({"sha256": 5}))
    with pytest.raises(UserError, match=rf"{state.stem}.*; remove {state.parent} to train from the start"):
        run(params)


def test_a_checkpoint_that_was_being_written_counts_for_nothing(params, monkeypatch):
    state = stopped_at(params, monkeypatch, 5)
    (state.parent / "00000009.safetensors").write_bytes(b"half")
    (state.parent / ".writing-x").mkdir()
    run(params)
    assert len(Path("results/steps.csv").read_text().splitlines()) == 13
    assert not list(checkpoints.FOLDER.glob("trial/*"))
