"""The trial stage: its six numbers, its facts, and which process writes them."""

import json
from pathlib import Path

import pytest

from gpt2_ladder import files
from gpt2_ladder.config import Params, Recipe
from gpt2_ladder.files import write_json
from gpt2_ladder.measuring import trials
from helpers import trainings
from pipeline import ENVIRONMENT, TRIAL, TRIAL_FACTS, read_json, trial

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


def test_without_seconds_only_the_losses_are_compared(run):
    numbers, facts = run(0, init="pytorch")
    assert [numbers[key] for key in NUMBERS[:4]] == [None] * 4
    assert numbers["loss"] == facts["loss_last"] > 0
    assert (facts["not_measured"], facts["measurement"]) == ("trial.cpu.seconds is 0", None)
    assert facts["not_compared"] == "other losses are expected with init"


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
