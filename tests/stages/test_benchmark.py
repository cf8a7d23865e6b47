"""The benchmark stage: where its arms run, what it profiles, and its arguments."""

import itertools
import json

import pytest
import torch

from gpt2_ladder import config, params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring import turns
from gpt2_ladder.measuring.turns import Arm, RemoteArm
from gpt2_ladder.training import loop
from helpers.common import REPOSITORY, environment, params_with
from pipeline import BENCHMARK, PROFILE, TRACES, benchmark


@pytest.mark.parametrize(("device", "types"), [("cpu", [Arm, RemoteArm, RemoteArm]), ("cuda", [Arm, Arm, Arm])])
def test_levels_that_keep_freed_memory_are_measured_apart_only_on_a_cpu(params, monkeypatch, device, types):
    def stop(arms: list[Arm | RemoteArm], *_: object) -> None:
        placed.extend(arms)
        raise UserError("placed")

    levels = {name: params.levels[name] for name in ("fused", "allocator", "chunked")}
    placed = list[Arm | RemoteArm]()
    monkeypatch.setattr(params_yaml, "load", lambda: params)
    monkeypatch.setattr(benchmark, "read_levels", lambda: (levels, 2))
    monkeypatch.setattr(benchmark, "read_settings", lambda: (params, environment(device=device, threads=1)))
    monkeypatch.setattr(turns.devices, "open_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(turns, "warm_up", stop)
    with pytest.raises(UserError, match="placed"):
        benchmark.measure(0, 1, 6, 1.0)
    assert [arm.name for arm in placed] == list(levels)
    assert [type(arm) for arm in placed] == types


def test_each_level_but_the_control_is_profiled_and_leaves_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = params_with(model="tiny")
    levels = dict.fromkeys(("fp32", config.CONTROL), params.levels["fp32"])
    arms = turns.build_arms(params, levels, torch.device("cpu"), 1)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    benchmark.profile(arms, (ids, ids), torch.device("cpu"))
    costs = json.loads(PROFILE.read_text())
    assert list(costs) == ["fp32"]
    assert "aten::mm" in {operator["name"] for operator in costs["fp32"]}
    assert [path.name for path in TRACES.iterdir()] == ["fp32.json.gz"]


def test_too_few_rounds_are_refused(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match="--rounds 5: too few for an interval; use at least 6"):
        benchmark.main("--rounds", "5")


def test_one_process_shows_no_variance_between_processes(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match="--processes 1: the variance between processes needs at least 2; 5 are usual"):
        benchmark.main("--processes", "1")


def test_every_time_in_a_benchmark_is_that_of_a_step_it_has_just_taken(params, monkeypatch):
    levels = dict.fromkeys(("fp32", config.CONTROL), params.levels["fp32"])
    monkeypatch.setattr(params_yaml, "load", lambda: params.model_copy(update={"profile": False}))
    monkeypatch.setattr(benchmark, "read_levels", lambda: (levels, 2))
    monkeypatch.setattr(turns.devices, "matmul_tflops", lambda *_: 1.0)
    times, returned = itertools.count(100.0), list[float]()
    monkeypatch.setattr(loop, "timed_step", lambda *_, **__: returned.append(next(times)) or returned[-1])
    for _ in range(2):
        returned.clear()
        benchmark.main("--rounds", "6")
        rounds = json.loads(BENCHMARK.read_text())["rounds"]
        measured = [each["step_ms"][name] for each in rounds for name in each["order"]]
        assert measured == returned[-12:]  # 6 rounds of two arms, in order
        assert len(returned) == 16  # with two steps of each arm to warm up
