"""Steps in turn: who shares what, in which order, and what is not allowed while the clock runs."""

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import pytest
import torch

from gpt2_ladder.config import MINIMUM_ROUNDS, AdamW
from gpt2_ladder.measuring import turns
from gpt2_ladder.measuring.turns import Arm, Weights
from gpt2_ladder.model import GPT
from gpt2_ladder.training import loop, runtime
from helpers.common import random_ids, tiny

CPU = torch.device("cpu")
BATCHES = [(random_ids(seed=i), random_ids(seed=i + 10)) for i in range(3)]


def weights() -> Weights:
    return Weights(1337, 1e-2, AdamW(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1), CPU)


def arms(count: int = 3) -> list[Arm]:
    lender = weights()
    return [Arm(f"arm{i}", *lender.lend(tiny()), "bf16" if i else "fp32", 2) for i in range(count)]


def measure(contestants, rounds=6, seconds=1e9, seed=0):
    return list(turns.measure(contestants, BATCHES, CPU, rounds, seconds, seed))


def test_networks_of_one_shape_share_parameters_and_optimizer():
    lender = weights()
    (eager, optimizer), (flash, same) = lender.lend(tiny()), lender.lend(tiny(attention="flash"))
    assert optimizer is same
    assert [id(p) for p in eager.parameters()] == [id(p) for p in flash.parameters()]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in eager.parameters()}
    assert eager.wte.weight is eager.lm_head.weight  # still tied
    assert eager.h[0].attn.attention != flash.h[0].attn.attention


def test_a_fused_optimizer_has_a_state_of_its_own_for_the_same_parameters():
    lender = weights()
    (model, plain), (same, fused) = lender.lend(tiny()), lender.lend(tiny(), True)
    assert plain is not fused
    assert fused.defaults["fused"]
    assert [id(p) for p in model.parameters()] == [id(p) for p in same.parameters()]
    assert lender.lend(tiny(), True)[1] is fused


def test_networks_of_another_shape_have_parameters_of_their_own():
    lender = weights()
    (narrow, optimizer), (padded, other) = lender.lend(tiny()), lender.lend(tiny(vocab_size=104))
    untied, _ = lender.lend(tiny(tie_weights=False))
    assert optimizer is not other
    assert not {id(p) for p in narrow.parameters()} & {id(p) for p in padded.parameters()}
    assert untied.wte.weight is not untied.lm_head.weight


def test_a_lent_network_computes_what_an_owned_one_does():
    lent, owned = weights().lend(tiny())[0], GPT(tiny())
    assert torch.equal(lent(BATCHES[0][0])[0], owned(BATCHES[0][0])[0])


def test_every_arm_takes_one_step_a_round_in_an_order_drawn_anew():
    found = measure(arms(), rounds=12)
    assert len(found) == 12
    for one in found:
        assert sorted(one.order) == list(one.step_ms) == ["arm0", "arm1", "arm2"]
        assert all(step_ms > 0 for step_ms in one.step_ms.values())
    assert len({tuple(one.order) for one in found}) >= 4  # of six: twelve draws miss three of them once in 10,000
    followers = {pair for one in found for pair in itertools.pairwise(one.order)}
    assert len(followers) == 6  # everybody follows everybody


def test_the_seed_decides_the_order():
    orders = [[one.order for one in measure(arms(), seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_each_round_has_one_batch_for_all(monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "train_step", lambda *call: seen.append(id(call[2])) or (torch.zeros(()), 1.0, None))
    measure(arms(2), rounds=4)
    assert seen == [id(BATCHES[index]) for index in (0, 0, 1, 1, 2, 2, 0, 0)]


def test_precision_is_each_arms_own_and_restored_afterwards(monkeypatch):
    seen = []

    def train_step(model, optimizer, batch, autocast, device, micro_batch):
        with autocast:
            seen.append((runtime.float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return torch.zeros(()), 1.0, None

    monkeypatch.setattr(loop, "train_step", train_step)
    lender = weights()
    contestants = [Arm(precision, *lender.lend(tiny()), precision, 2) for precision in ("fp32", "tf32", "bf16")]
    orders = [one.order for one in measure(contestants, rounds=5)]
    expected = {"fp32": ("ieee", False), "tf32": ("tf32", False), "bf16": ("ieee", True)}
    assert seen == [expected[name] for order in orders for name in order]
    contestants[1].step(BATCHES[0], CPU)  # tf32
    assert runtime.float32_matmul_precision() == "ieee"


@cache
def open_here(name: str) -> Arm:
    """An arm, and a mark in the process that opened it."""
    return Arm(name, *weights().lend(tiny()), "fp32", 2)


def where(arm: Arm) -> tuple[str, int, int]:
    return arm.name, os.getpid(), id(arm)


def test_an_arm_elsewhere_steps_in_one_process_of_its_own():
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        alone = turns.RemoteArm("alone", process, open_here)
        contestants = [alone, *arms(1)]
        assert sorted(turns.warm_up(contestants, BATCHES[0], CPU, seed=0)) == ["alone"] * 2 + ["arm0"] * 2
        found = measure(contestants)
        assert all(one.step_ms["alone"] > 0 for one in found)
        first, second = alone.run(where), alone.run(where)
    assert first == second  # the same arm in the same process
    assert first[0] == "alone"
    assert first[1] != os.getpid()


def test_an_error_elsewhere_arrives_here():
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        alone = turns.RemoteArm("alone", process, open_here)
        with pytest.raises(ValueError, match="batch_size"):
            alone.run(turns.step_as_compiled, (random_ids(time=32), random_ids(time=31)), CPU)


def test_time_ends_the_rounds_but_some_there_are(monkeypatch):
    clock = itertools.count(step=10)  # every look at the clock is ten seconds later
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(loop, "train_step", lambda *_: (torch.zeros(()), 1.0, None))
    assert len(measure(arms(2), rounds=30, seconds=1)) == MINIMUM_ROUNDS
    assert len(measure(arms(2), rounds=30, seconds=100)) == 8
    assert len(measure(arms(2), rounds=5, seconds=100)) == 5


def test_compilation_happens_in_the_warm_up_and_never_while_the_clock_runs():
    (model, optimizer), (other, _) = (lender := weights()).lend(tiny()), lender.lend(tiny())
    model.compile(backend="eager", dynamic=False, fullgraph=True)
    contestants = [Arm("compiled", model, optimizer, "fp32", 2), Arm("plain", other, optimizer, "fp32", 2)]
    assert sorted(turns.warm_up(contestants, BATCHES[0], CPU, seed=0)) == ["compiled"] * 2 + ["plain"] * 2
    measure(contestants)
    longer = [(random_ids(time=24), random_ids(time=24))]  # another shape than the one that was compiled
    with pytest.raises(RuntimeError, match="recompile"):
        list(turns.measure(contestants, longer, CPU, 3, 1e9, 0))


def test_a_bare_product_is_timed_in_every_round(monkeypatch):
    monkeypatch.setattr(turns, "matmul_tflops", lambda precision, device: {"fp32": 1.0, "bf16": 2.0}[precision])
    found = list(turns.measure(arms(2), BATCHES, CPU, 3, 1e9, 0, ("fp32", "bf16")))
    assert [one.matmul_tflops for one in found] == [{"fp32": 1.0, "bf16": 2.0}] * 3
