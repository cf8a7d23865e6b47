"""The benchmark stage: where its arms run, what it profiles, and its arguments."""

import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from gpt2_ladder import config, params_yaml
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring import turns
from gpt2_ladder.measuring.turns import Arm, RemoteArm
from gpt2_ladder.training import loop
from helpers.common import REPOSITORY, environment, params_with
from pipeline import BENCHMARK, PROFILE, TRACES, benchmark


def test_levels_that_keep_freed_memory_are_measured_in_another_process_only_on_a_cpu():
    params, device = params_with(model="tiny"), torch.device("cpu")
    levels = {name: params.levels[name] for name in ("fused", "allocator", "chunked")}
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # never started: it gets no work
        for kind, arm_types in (("cpu", [Arm, RemoteArm, RemoteArm]), ("cuda", [Arm, Arm, Arm])):
            arms = benchmark.place_arms(params, levels, environment(device=kind), device, 2, process)
            assert [arm.name for arm in arms] == list(levels)
            assert [type(arm) for arm in arms] == arm_types


def test_the_arms_of_the_other_process_share_their_weights(monkeypatch):
    params = params_with(model="tiny")
    levels = {name: params.levels[name] for name in ("fp32", "allocator", "chunked")}
    monkeypatch.setattr(benchmark, "read_levels", lambda: (levels, 2))
    monkeypatch.setattr(benchmark, "read_settings", lambda: (params, environment()))
    kept = []
    monkeypatch.setattr(benchmark.devices, "keep_freed_memory", kept.append)
    arms = [benchmark.open_arm(name) for name in ("allocator", "chunked", "allocator")]
    benchmark._open_arms.cache_clear()
    assert [(arm.name, arm.model.config.chunked_loss) for arm in arms[:2]] == [("allocator", False), ("chunked", True)]
    assert arms[0] is arms[2]
    assert arms[0].model.wte.weight is arms[1].model.wte.weight
    assert len(kept) == 1
    with pytest.raises(KeyError):
        benchmark.open_arm("fp32")


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
    monkeypatch.setattr(turns, "matmul_tflops", lambda *_: 1.0)
    times, returned = itertools.count(100.0), list[float]()
    monkeypatch.setattr(loop, "timed_step", lambda *_, **__: returned.append(next(times)) or returned[-1])
    for _ in range(2):
        returned.clear()
        benchmark.main("--rounds", "6")
        rounds = json.loads(BENCHMARK.read_text())["rounds"]
        measured = [each["step_ms"][name] for each in rounds for name in each["order"]]
        assert measured == returned[-12:]  # 6 rounds of two arms, in order
        assert len(returned) == 16  # with two steps of each arm to warm up
