"""The benchmark stage: where its arms run, what it profiles, and its arguments."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from gpt2_ladder import config
from gpt2_ladder.config import UserError
from gpt2_ladder.measuring import turns
from gpt2_ladder.measuring.turns import Arm, RemoteArm
from helpers.common import REPOSITORY, environment, params_with
from pipeline import PROFILE, TRACES, benchmark


def test_the_allocator_level_is_measured_in_its_own_process_only_on_a_cpu():
    params, device = params_with(model="tiny"), torch.device("cpu")
    levels = {name: params.levels[name] for name in ("chunked", "allocator")}
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # never started: it gets no work
        for kind, arm_types in (("cpu", [Arm, RemoteArm]), ("cuda", [Arm, Arm])):
            arms = benchmark.place_arms(params, levels, environment(device=kind), device, 2, process)
            assert [arm.name for arm in arms] == ["chunked", "allocator"]
            assert [type(arm) for arm in arms] == arm_types


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
