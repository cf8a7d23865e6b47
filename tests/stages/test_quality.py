"""`make quality`: the quality levels with several seeds."""

import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from experiments import quality
from experiments.quality import QUALITY, read_quality, seeds_table
from gpt2_ladder import params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.params import Params
from gpt2_ladder.training import data
from pipeline import read_metrics
from pipeline import train as train_stage

LEVELS = ("untied", "tied", "init")


@pytest.fixture
def climb(params, monkeypatch) -> Params:
    """Train the quality levels as the climb does, 6 steps each, and return the settings."""
    short = params.model_copy(update={"quality": params.quality.model_copy(update={"steps": 6})})
    monkeypatch.setattr(params_yaml, "load", lambda: short)
    for name in LEVELS:
        train_stage.main(name)
    return short


def test_all_levels_of_a_seed_are_trained_as_its_settings_in_params_yaml_train_them(climb, monkeypatch, capsys):
    bits, orders, make = {name: read_metrics(name)["loss_last"] for name in LEVELS}, [], data.Batches
    with monkeypatch.context() as patch:
        patch.setattr(data, "Batches", lambda *arguments: orders.append(arguments[3:]) or make(*arguments))
        quality.main("--seeds", "3")
    assert [order for order in orders if order] == 3 * [(1338,)] + 3 * [(1339,)]  # validation has no seed
    losses = json.loads(QUALITY.read_text())
    assert losses["1337"] == bits
    assert list(losses) == ["1337", "1338", "1339"]
    assert len({loss for row in losses.values() for loss in row.values()}) == 9
    assert f"seed 1339: last loss of untied {losses['1339']['untied']:.4f}, tied" in capsys.readouterr().out
    changed = {"seed": 1338, "data": climb.data.model_copy(update={"shuffle": True})}
    monkeypatch.setattr(params_yaml, "load", lambda: climb.model_copy(update=changed))
    for name in LEVELS:
        train_stage.main(name)
        assert read_metrics(name)["loss_last"] == losses["1338"][name]


def test_an_interrupted_run_keeps_its_complete_seeds_and_continues(climb, monkeypatch):
    trained, run = [], quality.training.run

    def stop_after(count):
        def run_or_stop(job, settings, *arguments):
            assert settings.checkpoint_every is None  # the climb has 2
            if len(trained) == count:
                raise KeyboardInterrupt
            trained.append(job.name)
            return run(job, settings, *arguments)

        monkeypatch.setattr(quality.training, "run", run_or_stop)

    stop_after(5)
    with pytest.raises(KeyboardInterrupt):
        quality.main("--seeds", "3")
    first = json.loads(QUALITY.read_text())
    assert list(first) == ["1337", "1338"]
    trained.clear()
    stop_after(99)
    quality.main("--seeds", "3")
    assert trained == [f"{name}, seed 1339" for name in LEVELS]
    assert json.loads(QUALITY.read_text())["1338"] == first["1338"]


def test_losses_of_another_climb_are_not_used(climb):
    climbed = {"1337": {name: read_metrics(name)["loss_last"] for name in LEVELS}}
    more = {"1338": dict.fromkeys(LEVELS, 9.0)}
    assert read_quality(climb) == climbed
    write_json(QUALITY, climbed | more)
    assert read_quality(climb) == climbed | more
    for other in (
        {"1337": climbed["1337"] | {"init": np.nextafter(climbed["1337"]["init"], 0)}},
        {"1337": {"untied": climbed["1337"]["untied"]}},
        {"1336": climbed["1337"]},
    ):
        write_json(QUALITY, other | more)
        assert read_quality(climb) == climbed


def test_the_interval_of_a_difference_is_students_t_over_pairs():
    generator = np.random.default_rng(0)
    draws = generator.normal(6.5, 0.3, 10)  # what the levels have in common
    columns = {"a": draws, "b": draws + generator.normal(0.3, 0.05, 10), "c": draws + generator.normal(0, 0.05, 10)}
    rows = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    _, *table = seeds_table({str(seed): row for seed, row in enumerate(rows)})
    assert [row[0] for row in table] == ["a", "b", "c", "a - b", "a - c", "b - c"]
    assert table[0][1:3] == [f"{draws.mean():.4f}", f"{draws.std(ddof=1):.4f}"]
    for row, verdict in zip(table[3:], ("yes", "no", "yes"), strict=True):
        first, second = (columns[name] for name in row[0].split(" - "))
        low, high = ttest_rel(first, second).confidence_interval(0.95)
        difference = first - second
        numbers = [f"{difference.mean():+.4f}", f"{difference.std(ddof=1):.4f}", f"[{low:+.4f}, {high:+.4f}]"]
        assert row[1:] == [*numbers, verdict]


def test_equal_losses_do_not_differ_by_more_than_chance():
    table = seeds_table({"1": {"a": 6.5, "b": 6.5}, "2": {"a": 6.7, "b": 6.7}})
    assert table[-1] == ["a - b", "+0.0000", "0.0000", "[+0.0000, +0.0000]", "no"]


@pytest.mark.parametrize(
    ("seeds", "error"),
    [
        *((str(count), f"--seeds {count}: must be 2 or more, because one draw has no interval") for count in (0, 1)),
        *(
            (text, f"argument --seeds: invalid int value: '{text}'; for all options, run")
            for text in ("ten", "2.5", "")
        ),
    ],
)
def test_a_wrong_number_of_seeds_is_refused_before_anything_is_read(tmp_path, monkeypatch, seeds, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        quality.main("--seeds", seeds)
    assert str(raised.value).startswith(error)
    assert list(tmp_path.iterdir()) == []
