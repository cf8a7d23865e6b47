"""Predictions, against arithmetic by hand and against what a process on this CPU really takes."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY, tiny

from gpt2_ladder import config, cost, planning
from gpt2_ladder.config import UserError
from gpt2_ladder.planning import Operation, Plan
from pipeline import plan

PARAMS = config.load(REPOSITORY / "params.yaml")
FP32, FLASH = PARAMS.levels["fp32"], PARAMS.levels["flash"]
GPT2 = PARAMS.models["gpt2"].gpt()


def test_operations_are_those_of_the_formula_but_for_what_it_leaves_out():
    found = planning.plan_step(GPT2, FP32, 2, 256)
    formula = 2 * 256 * cost.flops_per_token(GPT2, 256)
    assert found.flops == pytest.approx(formula, rel=2e-3)  # the formula counts biases and LayerNorms as products, too


def test_memory_of_the_parameters_is_sixteen_bytes_each():
    shape = tiny(n_embd=256)
    found = planning.plan_step(shape, FP32, 1, 2)  # hardly an activation
    parameters = 97 * 256 + 32 * 256 + 2 * (12 * 256**2 + 13 * 256) + 2 * 256
    assert found.peak_bytes == pytest.approx(20 * parameters, rel=0.01)  # and the optimizer's two temporaries


def test_flash_attention_needs_less_memory_than_eager():
    eager, flash = (planning.plan_step(GPT2, level, 4, 1024) for level in (PARAMS.levels["bf16"], FLASH))
    square = 4 * 12 * 1024 * 1024  # (B, H, T, T)
    assert eager.peak_bytes - flash.peak_bytes > 12 * 2 * square  # in every layer, bfloat16


def test_the_largest_batch_is_the_last_that_fits():
    memory = 24 * 2**30
    size = planning.largest_batch(GPT2, FP32, 1024, memory)
    usable = 0.9 * memory - 2**30
    assert planning.plan_step(GPT2, FP32, size, 1024).peak_bytes <= usable
    assert planning.plan_step(GPT2, FP32, size + 1, 1024).peak_bytes > usable
    assert planning.largest_batch(GPT2, FP32, 1024, 2**30) == 0


def test_a_bound_is_the_slower_of_arithmetic_and_memory():
    import torch

    product, copy = Operation(10**12, 10**6, torch.float32), Operation(0, 10**9, torch.float32)
    peaks = {"fp32": 10.0, "tf32": 100.0, "bf16": 200.0}
    both = Plan(0, 0, [product, copy])
    assert planning.lower_bound_ms(both, peaks, 1000.0, "fp32", fused=False) == pytest.approx(100 + 1)
    assert planning.lower_bound_ms(both, peaks, 1000.0, "tf32", fused=False) == pytest.approx(10 + 1)
    assert planning.lower_bound_ms(both, peaks, 1000.0, "tf32", fused=True) == pytest.approx(10)


@pytest.mark.parametrize("text", ["24", "24 GB of it", "-3GiB", "GiB"])
def test_memory_is_a_number_and_a_unit(text):
    assert plan.parse_memory("24GiB") == 24 * 2**30
    assert plan.parse_memory("80 GB") == 80e9
    with pytest.raises(UserError, match="write it as 24GiB or 80GB"):
        plan.parse_memory(text)


PROBE = """
import json, resource, sys
sys.path[:0] = ["src", "."]
import torch
from gpt2_ladder import config, runtime, training
from gpt2_ladder.model import GPT
params = config.load()
level, size = params.levels[sys.argv[1]], params.size.gpt().model_copy(update=json.loads(sys.argv[2]))
size = size.model_copy(update={"attention": level.attention})
network = GPT(size)
optimizer = training.make_optimizer(network, 1e-3, params.optimizer)
x = torch.randint(50257, (int(sys.argv[3]), int(sys.argv[4])))
def rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = x[:1, :8]
cpu = torch.device("cpu")
training.train_step(network, optimizer, (small, small), runtime.set_precision(level.precision, cpu), cpu)
before = rss()
training.train_step(network, optimizer, (x, x), runtime.set_precision(level.precision, cpu), cpu)
print(rss() - before)
"""
