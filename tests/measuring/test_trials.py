"""The trial is compared with fp32: what it changes, how fast it is, and whether its losses agree."""

import json
import math
import time

import pytest
import torch
from torch.nn.utils import get_total_norm

from gpt2_ladder.config import Recipe
from gpt2_ladder.measuring import trials, turns
from gpt2_ladder.measuring.turns import Arm, RemoteArm
from gpt2_ladder.params import Params
from helpers.common import environment, measurement, params_with, random_ids

LOSSES = [10.9, 10.5, 9.0]


def small(**changes: object) -> Params:
    """Return settings with a network that takes a step in milliseconds."""
    document = params_with().model_dump() | {"model": "tiny", **changes}
    document["models"]["tiny"] |= {"n_layer": 1, "n_head": 1, "n_embd": 8}
    return Params.model_validate(document)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(random_ids(2, 8, seed=seed), random_ids(2, 8, seed=seed + 1)) for seed in range(2)]


def test_only_what_differs_from_the_row_fp32_and_the_plain_recipe_is_a_change():
    assert params_with().changes == {}
    recipe = Recipe(clip_norm=1.0)
    changed = params_with(precision="bf16", compile=True, recipe=recipe)
    assert changed.changes == {"precision": "bf16", "compile": "true", "recipe.clip_norm": "1.0"}


@pytest.mark.parametrize(
    ("changes", "shift", "apart"),
    [
        ({"precision": "bf16"}, 0.0006, 0.0006),
        ({"precision": "bf16"}, 0.5, 0.5),  # a trial that computes something else is shown, not refused
        ({"vocab_size": 50304}, math.log(50304 / 50257), 0.0),
        ({"vocab_size": 50304}, math.log(50304 / 50257) + 0.001, 0.001),
        ({"init": "pytorch"}, 0.1, None),
        ({"tie_weights": False}, 0.1, None),
        ({"recipe": Recipe(schedule="cosine")}, 0.1, None),
    ],
)
def test_losses_are_compared_if_the_trial_computes_the_same(changes, shift, apart):
    params = params_with(**changes)
    result = trials.compare_losses(params, params.changes, [loss + shift for loss in LOSSES], LOSSES)
    assert result["loss_apart"] == (None if apart is None else pytest.approx(apart, abs=1e-9))
    key = next(iter(params.changes))
    assert result["not_compared"] == (f"other losses are expected with {key}" if apart is None else None)


def test_losses_that_parity_does_not_check_or_that_are_missing_are_not_compared():
    params = params_with()
    later = [9.0] * params.parity.steps
    assert trials.compare_losses(params, {}, [*later, 5.0], [*later, 4.0])["loss_apart"] == 0.0
    assert trials.compare_losses(params, {}, LOSSES, [])["not_compared"] == "fp32 has no losses"
    assert trials.compare_losses(params, {}, [], LOSSES)["not_compared"] == "the trial has no losses"


def test_fewer_than_six_rounds_give_no_gain_but_are_kept():
    run = measurement(fp32=[300.0] * 5, trial=[150.0] * 5)
    result = trials.judge(run)
    assert (result["gain"], result["not_measured"]) == (None, "6 rounds are needed, but only 5 fitted in")
    assert result["measurement"]["rounds"] == run.model_dump()["rounds"]
    gain = trials.judge(measurement(fp32=[300.0] * 6, trial=[150.0] * 6))["gain"]
    assert (gain["over"], gain["ratio"], gain["verdict"]) == ("fp32", pytest.approx(2.0), "faster")


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-9, 1), (1e9, trials.MOST_ROUNDS)])
def test_as_many_rounds_as_fit_into_the_seconds_are_taken(monkeypatch, seconds, rounds):
    monkeypatch.setattr(trials, "MOST_ROUNDS", 8)
    result = trials.measure(small(fused_adamw=True), environment(threads=1), 2, batches(), seconds)
    assert len(result.rounds) == min(rounds, 8)
    assert sorted(result.rounds[0].step_ms) == ["control", "fp32", "trial"]
    assert (result.levels, result.batch_size, result.block_size) == (["fp32", "trial"], 2, 8)
    assert json.loads(result.model_dump_json())["environment"]["threads"] == 1


def test_the_seconds_begin_after_the_warm_up(monkeypatch):
    events: list[str] = []
    look = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("look") or look())
    monkeypatch.setattr(Arm, "step", lambda arm, *_: events.append(arm.name) or 1.0)
    trials.measure(small(), environment(threads=1), 2, batches(), 1e-9)
    assert sorted(events[: events.index("look")]) == sorted(2 * ["control", "fp32", "trial"])


def test_a_trial_with_cuda_graphs_takes_three_steps_before_it_is_measured(monkeypatch):
    def steps(*arguments: object) -> list[str]:
        taken.append(arguments[-1])
        return []

    taken: list[object] = []
    monkeypatch.setattr(trials.turns, "warm_up", steps)
    monkeypatch.setattr(Arm, "step", lambda *_: 1.0)  # nothing is compiled
    for changes in ({}, {"compile": True, "cuda_graphs": True}):
        trials.measure(small(**changes), environment(threads=1), 2, batches(), 1e-9)
    assert taken == [False, True]


def test_fp32_has_a_process_of_its_own_if_the_trial_has_set_the_allocator(monkeypatch):
    remote: set[str] = set()
    monkeypatch.setattr(trials.devices, "keep_freed_memory", lambda _: None)
    monkeypatch.setattr(RemoteArm, "run", lambda arm, *_: remote.add(arm.name) or 1.0)
    for allocator, expected in (("system", set()), ("caching", {"fp32", "control"})):
        trials.measure(small(allocator=allocator), environment(threads=1), 2, batches(), 1e-9)
        assert remote == expected


def test_the_trials_steps_clip_and_decay_as_its_recipe_says():
    params = small(recipe=Recipe(clip_norm=1e-3, decay="matrices").model_dump())
    row = {"trial": params.switches}
    plain, trial = (turns.open_arms(params, environment(threads=1), 2, row)["trial"] for _ in "12")
    assert trials.follow_recipe(plain, small()) is plain
    trial = trials.follow_recipe(trial, params)
    assert [group["weight_decay"] for group in trial.optimizer.param_groups] == [0.01, 0.0]
    for arm, expected in ((plain, False), (trial, True)):
        arm.step(batches()[0], torch.device("cpu"))
        norm = get_total_norm([parameter.grad for parameter in arm.model.parameters()])
        assert (norm.item() < 1.001e-3) == expected
