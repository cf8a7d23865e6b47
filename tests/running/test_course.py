"""A training with a time limit fixes its number of steps, and one that validates keeps the best network."""

import json
import os
import signal
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.running import checkpoints, following, run
from gpt2_ladder.training import loop
from helpers.trainings import train


def with_recipe(params: Params, **recipe: object) -> Params:
    """Return the trial's settings with these keys of `recipe`."""
    return Params.model_validate(params.model_dump() | {"recipe": params.recipe.model_dump() | recipe}).for_trial()


def facts() -> dict:
    return json.loads(Path("results/metrics.json").read_text())


def rows() -> list[str]:
    """Return the lines of steps.csv without the times."""
    lines = [line.split(",") for line in Path("results/steps.csv").read_text().splitlines()[1:]]
    return [",".join(line[:2] + line[4:6]) for line in lines]


def weights(model: GPT, into: list[torch.Tensor]) -> None:
    into[:] = [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("steps", "expected"), [(None, 60), (45, 45)])
def test_after_20_steps_it_is_known_how_many_fit_into_the_minutes(params, monkeypatch, steps, expected):
    clock, rates = count(), {}
    monkeypatch.setattr(following, "time", SimpleNamespace(perf_counter=lambda: next(clock)))  # a step takes one second
    monkeypatch.setattr(loop, "learning_rate_at", lambda step, steps, *_: rates.update({step: steps}) or 1e-3)
    train(with_recipe(params, minutes=1.0, steps=steps))
    assert len(rows()) == expected
    assert [steps for step, steps in rates.items() if step >= 20] == [expected] * (expected - 20)  # for the schedule


def test_a_warm_up_longer_than_the_minutes_is_refused(params):
    with pytest.raises(
        UserError, match=r"recipe.lr_warmup_steps = 500, but \d+ steps fit into 1e-06 minutes; set more"
    ):
        train(with_recipe(params, minutes=1e-6, lr_warmup_steps=500))


def test_an_interrupted_training_keeps_its_number_of_steps_and_its_best_network(params, monkeypatch):
    params = with_recipe(params, minutes=1.0, eval_every=4)
    fixed, kept, resumed = [], list[torch.Tensor](), list[torch.Tensor]()
    monkeypatch.setattr(following, "_count_steps", lambda *_: fixed.append(1) or 30)
    train(params.model_copy(update={"checkpoint_every": None}), keep=partial(weights, into=kept))
    steps, validations = rows(), facts()["validations"]
    assert [int(step) for step in validations] == [0, *range(4, 30, 4), 30]
    step, calls = loop.train_step, []

    def train_step(*args, **options):
        calls.append(args)
        if len(calls) == 26:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(UserError, match="stopped by SIGINT after step 25; the next run resumes"):
        train(params)
    train(params, keep=partial(weights, into=resumed))
    assert len(fixed) == 2  # by the undisturbed training and by the interrupted one
    assert (rows(), facts()["validations"], len(calls)) == (steps, validations, 30)
    assert all(torch.equal(a, b) for a, b in zip(kept, resumed, strict=True))


@pytest.mark.parametrize("best", [4, 8, 12])
def test_the_network_with_the_smallest_validation_loss_is_kept(params, monkeypatch, best):
    kept, expected = list[torch.Tensor](), list[torch.Tensor]()
    constant = {"schedule": "constant", "lr_warmup_steps": 0}
    train(with_recipe(params, steps=best, **constant), keep=partial(weights, into=expected))
    losses = {0: 5.0, 4: 4.0, 8: 4.0, 12: 4.0, best: 3.0}
    script = iter(losses.values())
    monkeypatch.setattr(run, "_validate", lambda *_: next(script, 3.0))
    train(with_recipe(params, steps=12, eval_every=4, **constant), keep=partial(weights, into=kept))
    assert facts()["validations"] == {str(step): loss for step, loss in losses.items()}
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_validation_does_not_change_the_training(params):
    train(with_recipe(params))
    plain = rows()
    train(with_recipe(params, eval_every=1))
    assert rows() == plain
    validations = list(facts()["validations"].values())
    assert facts()["val_loss"] == min(validations)
    assert all(a != b for a, b in pairwise(validations))


def test_a_training_too_short_for_its_minutes_validates_its_last_step(params):
    train(with_recipe(params, minutes=60.0, steps=6, eval_every=4))
    assert list(facts()["validations"]) == ["0", "4", "6"]


def test_every_validation_is_the_loss_on_the_validation_shard(params, monkeypatch):
    ids = torch.from_numpy(np.fromfile("data/val.bin", dtype="<u2").astype(np.int64))[: 32 + 1]
    expected, validated = dict[str, float](), checkpoints.Course.validated

    def by_hand(model: GPT) -> float:
        with torch.no_grad():
            logits, _ = model(ids[:-1].view(2, 16))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:]).item()

    def noted(course: checkpoints.Course, step: int, loss: float, model: GPT) -> None:
        expected[str(step)] = by_hand(model)
        validated(course, step, loss, model)

    monkeypatch.setattr(checkpoints.Course, "validated", noted)
    train(with_recipe(params, eval_every=4), keep=lambda model: expected.update(last=by_hand(model)))
    assert [*expected] == ["0", "4", "8", "12", "last"]
    # the same operations; eval_tokens is 32
    assert {**facts()["validations"], "last": facts()["val_loss"]} == pytest.approx(expected, abs=1e-5)
