"""Steps in turn: what arms share, their order, and what may not happen while the clock runs."""

import itertools
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch

from gpt2_ladder.config import MINIMUM_ROUNDS
from gpt2_ladder.measuring import turns
from gpt2_ladder.measuring.turns import Arm, SharedWeights
from gpt2_ladder.model import GPT
from gpt2_ladder.training import loop, runtime
from helpers.common import environment, params_with, random_ids, tiny

CPU = torch.device("cpu")
BATCHES = [(random_ids(seed=i), random_ids(seed=i + 10)) for i in range(3)]


@pytest.fixture
def weights() -> SharedWeights:
    return SharedWeights(params_with(model="tiny"), CPU)


@pytest.fixture
def arms(weights) -> list[Arm]:
    return [Arm(f"arm{i}", *weights.build(tiny()), "bf16" if i else "fp32", 2) for i in range(3)]


@pytest.fixture
def no_training(monkeypatch) -> list[int]:
    """Replace the training step; the ids of the batches it was given."""
    batches: list[int] = []
    monkeypatch.setattr(loop, "timed_step", lambda *call, **_: batches.append(id(call[2])) or 1.0)
    return batches


def measure(arms, rounds=6, seconds=1e9, seed=0, matmuls=()):
    return list(turns.measure(arms, BATCHES, CPU, rounds, seconds, seed, matmuls))


def ids(model: GPT) -> list[int]:
    return [id(parameter) for parameter in model.parameters()]


def test_networks_of_one_shape_share_parameters_and_optimizer(weights):
    (eager, optimizer), (flash, same) = weights.build(tiny()), weights.build(tiny(attention="flash"))
    assert optimizer is same
    assert ids(eager) == ids(flash)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {*ids(eager)}
    assert eager.wte.weight is eager.lm_head.weight  # still tied
    assert eager.h[0].attn.attention != flash.h[0].attn.attention
    assert torch.equal(eager(BATCHES[0][0])[0], GPT(tiny())(BATCHES[0][0])[0])


def test_a_fused_optimizer_updates_the_same_parameters_with_its_own_state(weights):
    (model, plain), (same, fused) = weights.build(tiny()), weights.build(tiny(), True)
    assert plain is not fused
    assert fused.defaults["fused"]
    assert ids(model) == ids(same)
    assert weights.build(tiny(), True)[1] is fused


def test_networks_of_another_shape_have_their_own_parameters(weights):
    (narrow, optimizer), (padded, other) = weights.build(tiny()), weights.build(tiny(vocab_size=104))
    untied, _ = weights.build(tiny(tie_weights=False))
    assert optimizer is not other
    assert not {*ids(narrow)} & {*ids(padded)}
    assert untied.wte.weight is not untied.lm_head.weight


def test_every_arm_takes_one_step_a_round_in_a_random_order(arms):
    rounds = measure(arms, rounds=12)
    assert len(rounds) == 12
    for each in rounds:
        assert sorted(each.order) == list(each.step_ms) == ["arm0", "arm1", "arm2"]
        assert all(step_ms > 0 for step_ms in each.step_ms.values())
    assert len({tuple(each.order) for each in rounds}) >= 4  # of six: 12 draws miss three with probability 1e-4
    assert len({pair for each in rounds for pair in itertools.pairwise(each.order)}) == 6  # every pair of neighbours


def test_the_seed_determines_the_orders(arms, no_training):
    orders = [[each.order for each in measure(arms, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_all_arms_of_a_round_get_the_same_batch(arms, no_training):
    measure(arms[:2], rounds=4)
    assert no_training == [id(BATCHES[index]) for index in (0, 0, 1, 1, 2, 2, 0, 0)]


def test_every_arm_steps_at_its_precision_and_restores_float32(weights, monkeypatch):
    seen = []

    def timed_step(model, optimizer, batch, autocast, device, micro_batch, scaler):
        with autocast:
            seen.append((runtime.float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return 1.0

    monkeypatch.setattr(loop, "timed_step", timed_step)
    arms = [Arm(precision, *weights.build(tiny()), precision, 2) for precision in ("fp32", "tf32", "bf16")]
    orders = [each.order for each in measure(arms, rounds=5)]
    expected = {"fp32": ("ieee", False), "tf32": ("tf32", False), "bf16": ("ieee", True)}
    assert seen == [expected[name] for order in orders for name in order]
    arms[1].step(BATCHES[0], CPU)  # tf32
    assert runtime.float32_matmul_precision() == "ieee"


@cache
def open_arm(name: str) -> Arm:
    return Arm(name, *SharedWeights(params_with(model="tiny"), CPU).build(tiny()), "fp32", 2)


def identify(arm: Arm) -> tuple[str, int, int]:
    return arm.name, os.getpid(), id(arm)


@pytest.mark.slow
def test_a_remote_arm_steps_in_its_own_process(arms):
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        remote = turns.RemoteArm("remote", process, open_arm)
        assert sorted(turns.warm_up([remote, arms[0]], BATCHES[0], CPU, seed=0)) == ["arm0"] * 2 + ["remote"] * 2
        assert all(each.step_ms["remote"] > 0 for each in measure([remote, arms[0]]))
        first, second = remote.run(identify), remote.run(identify)
        assert first == second  # the same arm in the same process
        assert first[0] == "remote"
        assert first[1] != os.getpid()
        with pytest.raises(ValueError, match="batch_size"):  # an error in that process arrives here
            remote.run(turns.step_as_compiled, (random_ids(time=32), random_ids(time=31)), CPU)


def first_parameter(arm: Arm) -> tuple[int, int]:
    return os.getpid(), next(arm.model.parameters()).data_ptr()


def test_arms_that_are_placed_apart_share_a_process_and_their_weights():
    params = params_with(model="tiny")
    levels = {name: params.levels[name] for name in ("allocator", "fp32", "chunked")}
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        apart = ("allocator", "chunked")
        arms = turns.place_arms(params, environment(threads=1), 2, levels, apart, process)
        assert [arm.name for arm in arms] == list(levels)
        first, here, second = [arm.run(first_parameter) for arm in arms]
    assert first == second
    assert here[0] == os.getpid() != first[0]


def test_a_process_that_builds_several_arms_that_keep_freed_memory_is_set_up_once(monkeypatch):
    params, kept = params_with(model="tiny"), []
    monkeypatch.setattr(turns.devices, "keep_freed_memory", kept.append)
    levels = {name: params.levels[name] for name in ("allocator", "chunked")}
    settings = pickle.dumps((params, environment(threads=1), 2, levels))
    arms = [turns._open_arm(settings, name) for name in ("allocator", "chunked", "allocator")]
    turns._open_arms.cache_clear()
    assert [(arm.name, arm.model.config.chunked_loss) for arm in arms[:2]] == [("allocator", False), ("chunked", True)]
    assert arms[0] is arms[2]
    assert kept == [CPU]


def test_a_switch_without_effect_is_not_measured(monkeypatch):
    compiled: list[tuple[bool, ...]] = []
    monkeypatch.setattr(turns.runtime, "compile_model", lambda _, *options: compiled.append(options))
    monkeypatch.setattr(turns.devices, "open_device", lambda *_: CPU)
    params = params_with(model="tiny", compile=True, autotune=True)
    for device, expected in (("cpu", (False, False)), ("cuda", (True, False))):
        turns.open_arms(params, environment(device=device, threads=1), 2, {"trial": params.switches})
        assert compiled.pop() == expected


def test_the_time_limit_ends_the_rounds_after_the_minimum(arms, no_training, monkeypatch):
    clock = itertools.count(step=10)  # advances by ten seconds at every reading
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    assert len(measure(arms, rounds=30, seconds=1)) == MINIMUM_ROUNDS
    assert len(measure(arms, rounds=30, seconds=100)) == 8
    assert len(measure(arms, rounds=5, seconds=100)) == 5


def test_compilation_happens_in_the_warm_up_and_never_while_measuring(weights):
    (model, optimizer), (other, _) = weights.build(tiny()), weights.build(tiny())
    model.compile(backend="eager", dynamic=False, fullgraph=True)
    arms = [Arm("compiled", model, optimizer, "fp32", 2), Arm("plain", other, optimizer, "fp32", 2)]
    list(turns.warm_up(arms, BATCHES[0], CPU, seed=0))
    measure(arms)
    longer = [(random_ids(time=24), random_ids(time=24))]  # another shape than the compiled one
    with pytest.raises(RuntimeError, match="recompile"):
        list(turns.measure(arms, longer, CPU, 3, 1e9, 0))


def test_a_bare_matrix_product_is_timed_in_every_round(arms, no_training, monkeypatch):
    monkeypatch.setattr(turns.devices, "matmul_tflops", lambda precision, device: {"fp32": 1.0, "bf16": 2.0}[precision])
    rounds = measure(arms, rounds=3, matmuls=("fp32", "bf16"))
    assert [each.matmul_tflops for each in rounds] == [{"fp32": 1.0, "bf16": 2.0}] * 3


@pytest.mark.parametrize(("cuda_graphs", "steps"), [(False, 2), (True, 3)])
def test_cuda_graphs_need_a_third_step_to_replay(monkeypatch, cuda_graphs, steps):
    monkeypatch.setattr(Arm, "step", lambda *_: 1.0)
    arms = [Arm(name, *[None] * 4) for name in "ab"]
    assert sorted(turns.warm_up(arms, BATCHES[0], CPU, 0, cuda_graphs)) == sorted("ab" * steps)


def test_a_timed_step_whose_gradient_overflowed_is_repeated():
    scales, times = iter([8.0, 4.0, 4.0, 4.0]), iter([1.0, 3.0])  # the first step halves the scale
    arm = Arm("arm", None, None, "fp16", 2, SimpleNamespace(get_scale=lambda: next(scales)))
    assert arm.take(lambda *_, **__: next(times), None, CPU) == 3.0
