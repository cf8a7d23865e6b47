"""The trial stage: its six numbers, its facts, and which process writes them."""

import json
from pathlib import Path

import pytest
import torch

from gpt2_ladder import files
from gpt2_ladder.config import Recipe, UserError
from gpt2_ladder.files import read_json, write_json
from gpt2_ladder.measuring import trials
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.training import data, metrics, runtime
from helpers import trainings
from helpers.common import environment
from pipeline import ENVIRONMENT, TRIAL, TRIAL_FACTS, trial

NUMBERS = ["gain", "low", "high", "loss_apart", "loss", "val"]


@pytest.fixture
def run(params: Params):
    """A function that trains fp32 and runs the stage, with some settings changed; it returns numbers and facts."""
    plain = params.model_copy(update={"recipe": Recipe(), "checkpoint_every": None})

    def run_stage(seconds: float = 0, **changes: object) -> tuple[dict, dict]:
        document = plain.model_dump() | changes
        document["trial"]["cpu"]["seconds"] = seconds
        Path("params.yaml").write_text(json.dumps(document))
        trainings.train(plain, "fp32", Path("results/levels/fp32"))
        trial.main()
        return read_json(trial.METRICS), read_json(TRIAL_FACTS)

    return run_stage


def test_a_trial_is_measured_and_its_losses_are_compared(run, monkeypatch):
    monkeypatch.setattr(trials, "MOST_ROUNDS", 6)  # on a busy machine, too: it stops after 6 rounds, not by the clock
    numbers, facts = run(600, chunked_loss=True)
    assert list(numbers) == NUMBERS
    assert [numbers[key] for key in NUMBERS[:3]] == [facts["gain"][key] for key in ("ratio", "low", "high")]
    assert 0 < numbers["low"] <= numbers["gain"] <= numbers["high"]
    assert len(facts["measurement"]["rounds"]) == 6
    assert 0 <= numbers["loss_apart"] < 1e-5
    assert (numbers["loss"], numbers["val"]) == (facts["loss_last"], facts["val_loss"])
    assert facts["changes"] == {"chunked_loss": "true"}
    assert facts["tokens_per_second"] > 0  # the content of a level's metrics.json is in the facts


def test_a_trial_in_float16_is_compared_with_fp32_up_to_its_first_skipped_step(run, monkeypatch):
    monkeypatch.setattr(runtime, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=2.0**20))
    numbers, facts = run(0, half="fp16", precision="bf16", fused_adamw=True)
    assert facts["changes"]["precision"] == "fp16"
    assert facts["skipped_steps"] > 1
    rows = [metrics.read_losses(Path("results", folder, "steps.csv")) for folder in ("trial", "levels/fp32")]
    apart = [abs(ours - theirs) for ours, theirs in zip(*rows, strict=True)]
    assert numbers["loss_apart"] == pytest.approx(apart[0])
    assert apart[0] < max(apart[:10]) / 10


def test_without_seconds_only_the_losses_are_compared(run):
    numbers, facts = run(0, init="pytorch")
    assert [numbers[key] for key in NUMBERS[:4]] == [None] * 4
    assert numbers["loss"] == facts["loss_last"] > 0
    assert (facts["not_measured"], facts["measurement"]) == ("trial.cpu.seconds is 0", None)
    assert facts["not_compared"] == "other losses are expected with init"


def test_the_losses_of_a_trial_that_is_shorter_than_the_checked_steps_are_compared(run, params):
    numbers, facts = run(0, recipe=Recipe(steps=2).model_dump())
    assert facts["steps"] == 2 < params.parity.steps
    assert numbers["loss_apart"] == 0


def test_a_trial_whose_change_has_no_effect_here_is_compared_but_not_measured(run):
    numbers, facts = run(600, precision="tf32")
    assert (facts["status"], facts["changes"], numbers["loss_apart"]) == ("trained", {"precision": "tf32"}, 0.0)
    assert (numbers["gain"], facts["measurement"]) == (None, None)
    assert facts["not_measured"].startswith("`precision: tf32` has no effect on this device: TF32 is a mode")


def test_a_trial_that_splits_its_batches_is_measured_without_cuda_graphs(params, monkeypatch):
    changes = {"compile": True, "cuda_graphs": True, "recipe": Recipe().model_dump()}
    graphs = Params.model_validate(params.model_dump() | changes)
    for folder in (trial.FOLDER, Path("results/levels/fp32")):
        files.write(folder / "steps.csv", metrics.HEADER)
    measured: list[bool] = []
    monkeypatch.setattr(trials, "measure", lambda own, *_: measured.append(own.cuda_graphs))
    monkeypatch.setattr(trials, "judge", lambda _: {"gain": None})
    for rows in (2, 1):
        facts = {"status": "trained", "reason": None, "micro_batch": rows, "loss_last": 1.0, "val_loss": 1.0}
        write_json(trial.METRICS, facts)
        trial.conclude(graphs, environment(device="cuda"))
    assert measured == [True, False]


def test_a_skipped_trial_has_six_empty_numbers_and_a_reason(run):
    write_json(ENVIRONMENT, {**read_json(ENVIRONMENT), "bf16": False})
    numbers, facts = run(1, precision="bf16")
    assert numbers == dict.fromkeys(NUMBERS)
    assert facts["status"] == "skipped"
    assert facts["not_measured"] == facts["reason"]
    assert facts["not_compared"] == "the trial has no losses"
    assert list(TRIAL.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "concludes"),
    [
        ({}, True),
        ({"RANK": "0"}, True),  # torchrun was started by hand
        ({"RANK": "1"}, False),
        ({"RANK": "0", files.ERROR_FILE: "error"}, False),  # the process that started this rank measures
    ],
)
def test_one_process_measures_after_a_training_on_several_ranks(params, monkeypatch, variables, concludes):
    Path("params.yaml").write_text(params.model_dump_json())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(trial, "run_job", lambda *_: True)
    monkeypatch.setattr(trial, "conclude", lambda *_: calls.append(1))
    trial.main()
    assert bool(calls) == concludes


def test_a_trial_with_its_own_size_and_shape_uses_them_everywhere(run, params, monkeypatch):
    monkeypatch.setattr(trials, "MOST_ROUNDS", 6)
    own = {"model": "small", "batch_size": 4, "block_size": 8, "steps": 14, "learning_rate": 1e-4, "shuffle": True}
    document = params.model_dump()
    document["models"]["small"] |= {"n_layer": 1, "n_head": 1, "n_embd": 16}
    _, facts = run(600, recipe=Recipe(**own).model_dump(), models=document["models"])
    assert facts["parameters"] == 16 * (50257 + 8) + 12 * 16 * 16 + 13 * 16 + 2 * 16  # 8 positions
    assert (facts["steps"], facts["micro_batch"], facts["epochs_seen"]) == (14, 4, pytest.approx(14 * 32 / 1984))
    measured = facts["measurement"]
    assert (measured["model"], measured["batch_size"], measured["block_size"]) == ("small", 4, 8)
    assert facts["changes"]["recipe.model"] == "small"
    assert facts["not_compared"].startswith("other losses are expected with recipe.shuffle, recipe.model")


def test_a_longer_trial_is_still_compared_with_fp32(run):
    numbers, facts = run(0, recipe=Recipe(steps=15, eval_every=5).model_dump())
    assert (facts["steps"], numbers["loss_apart"]) == (15, 0.0)


@pytest.mark.parametrize("fits", [True, False])
def test_a_trial_that_does_not_fit_is_refused_and_a_baseline_that_does_not_fit_is_not_measured(run, monkeypatch, fits):
    rows = {"flash": 2 if fits else 0, "eager": 0}
    monkeypatch.setattr(trial.planning, "fitting_rows", lambda config, *_: rows[config.attention])
    recipe = Recipe(block_size=8).model_dump()
    if fits:
        _, facts = run(1, attention="flash", recipe=recipe)
        assert facts["not_measured"] == "fp32 does not fit into memory at the trial's size and shape"
    else:
        with pytest.raises(UserError, match=r"trial: memory does not suffice for one row of .* \(8\) of tiny; set a"):
            run(1, attention="flash", recipe=recipe)


def pretrained(folder: Path, params: Params, **changes: object) -> GPT:
    """Write a network of the tiny size with large weights to `folder` in the hub's format, and return it."""
    network = GPT(params.size.gpt().model_copy(update=changes), seed=5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 3
    hub_format.save_gpt(network, folder)
    return network


@pytest.mark.parametrize("vocab_size", [50257, 50304])
@pytest.mark.parametrize("checkpoint_every", [None, 5])
def test_a_trial_starts_from_a_folder_and_records_its_hash(run, params, vocab_size, checkpoint_every):
    network = pretrained(Path("mine"), params)
    changes = {"vocab_size": vocab_size, "checkpoint_every": checkpoint_every}
    _, facts = run(0, recipe=Recipe(start="mine").model_dump(), **changes)
    x, y = next(data.Batches(data.open_shard(Path("data/train.bin")), 2, 16))
    with torch.no_grad():
        expected = network(x, y)[1].item()
    assert facts["loss_first"] == pytest.approx(expected, abs=0.01 if vocab_size > 50257 else 1e-5)
    assert facts["start_sha256"] == files.sha256(Path("mine/model.safetensors"))
    assert facts["not_compared"] == "other losses are expected with recipe.start"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("openai", r"recipe.start = openai: data/gpt2 has random stand-in weights, not OpenAI's; run `dvc repro -f"),
        ("nowhere", "recipe.start = nowhere: there is no such folder; name one with config.json, or openai"),
        ("deep", "recipe.start = deep: n_layer is 2, but tiny has 1; set recipe.model to the size of these weights"),
        ("untied", "recipe.start = untied: its head is a matrix of its own; set tie_weights: false"),
        ("empty", "empty: not a readable checkpoint"),
    ],
)
def test_weights_that_a_trial_cannot_start_from_are_refused(run, params, start, message):
    for folder, changes in (("data/gpt2", {}), ("deep", {"n_layer": 2}), ("untied", {"tie_weights": False})):
        pretrained(Path(folder), params, **changes)
    Path("empty").mkdir()
    weights = Path("data/gpt2/model.safetensors")
    downloads.write_provenance(weights, downloads.STAND_IN, files.sha256(weights), "")
    with pytest.raises(UserError, match=message):
        run(0, recipe=Recipe(start=start).model_dump())
    assert not TRIAL_FACTS.exists()
    assert not TRIAL.exists()
