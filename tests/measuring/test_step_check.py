"""The check of a step: what it finds, and that it lets right steps pass."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments import power
from gpt2_ladder.config import BASELINE, UserError
from gpt2_ladder.measuring import step_check, turns
from gpt2_ladder.measuring.step_check import StepCheck
from gpt2_ladder.model import GPT
from helpers.common import params_with, random_ids, tiny
from pipeline import benchmark

CPU = torch.device("cpu")
PARAMS = params_with(model="tiny")
BATCH = random_ids(power.B, 64, 50257), random_ids(power.B, 64, 50257, seed=1)
SCHEDULE = "learning-rate schedule one step early"  # an arm's learning rate is constant
SMALL = ["LayerNorm's eps 1e-6, not 1e-5", "exact GELU, not tanh"]
NOT_FOUND = {"fp32": [SCHEDULE], "bf16": [SCHEDULE, *SMALL]}


def check(name: str, **switches: object) -> StepCheck:
    arm = power.make_arm(PARAMS, PARAMS.levels[name].model_copy(update={"compile": False, **switches}), seed=0)
    return step_check.check(arm, BATCH, CPU, PARAMS.size.learning_rate, PARAMS.optimizer)


@pytest.mark.parametrize("name", ["fp32", "bf16", "flash", "padded", "fused", "chunked"])
def test_right_steps_pass_with_a_margin(name):
    result, precision = check(name), PARAMS.levels[name].precision
    assert result.fault(precision) is None
    assert result.gradient < step_check.GRADIENT[precision] / 2
    assert result.update < step_check.UPDATE / 2


def test_a_step_in_float16_that_overflows_at_first_is_checked_when_it_does_not():
    result = check(BASELINE, precision="fp16")
    assert result.fault("fp16") is None
    assert result.gradient < step_check.GRADIENT["fp16"] / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", power.FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_are_found(fault, precision):
    switches = PARAMS.levels[precision].model_copy(update={"vocab_size": fault.vocab_size})
    with fault.patch():
        arm = power.make_arm(PARAMS, switches, seed=0)
        fault.plant(arm)
        result = step_check.check(arm, BATCH, CPU, PARAMS.size.learning_rate, PARAMS.optimizer)
    assert (result.fault(precision) is None) == (fault.name in NOT_FOUND[precision])


def test_a_level_that_leaves_out_a_block_is_found_after_another_has_trained_it():
    """The levels share their optimizer, which then has moments of the block's parameters."""
    rows = dict.fromkeys(("right", "wrong"), PARAMS.levels[BASELINE])
    right, wrong = turns.build_arms(PARAMS, rows, CPU, power.MICRO_BATCH)
    settings = PARAMS.size.learning_rate, PARAMS.optimizer
    assert step_check.check(right, BATCH, CPU, *settings).fault("fp32") is None
    power.skip_layer(wrong)
    assert step_check.check(wrong, BATCH, CPU, *settings).gradient == math.inf


def test_the_order_of_the_checks_does_not_matter():
    """A check leaves trained weights and moments behind, which the next one must not notice."""
    rows = dict.fromkeys("ab", PARAMS.levels[BASELINE])
    first, second = turns.build_arms(PARAMS, rows, CPU, power.MICRO_BATCH)
    settings = PARAMS.size.learning_rate, PARAMS.optimizer
    for arm in (first, second, first):
        result = step_check.check(arm, BATCH, CPU, *settings)
        assert (result.gradient, result.update) == (0, 0)


def test_the_attention_is_sharp():
    model = GPT(tiny(n_embd=64, n_positions=64))
    step_check.sharpen(model)
    outputs: list[torch.Tensor] = []
    model.h[0].attn.c_attn.register_forward_hook(lambda _, __, y: outputs.append(y.detach()))
    model(random_ids(4, 64))
    q, k, _ = (each.view(4, 64, 2, 32).transpose(1, 2) for each in outputs[0].split(64, dim=2))
    deviation = float((q @ k.transpose(-2, -1) / math.sqrt(32)).std())
    assert deviation == pytest.approx(step_check.SHARPNESS, rel=0.2)
    projection = model.h[0].mlp.c_proj.weight.detach()
    assert float(projection.std()) == pytest.approx(step_check.STD / 2, rel=0.05)  # over sqrt(2 n_layer)


def test_the_update_is_that_of_torch_in_float64():
    weight = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    settings = PARAMS.optimizer
    optimizer = torch.optim.AdamW(
        [weight], lr=0.01, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    moments = torch.zeros(2, 50, dtype=torch.float64)
    for step in (1, 2, 3):
        weight.grad, old = torch.randn(50, dtype=torch.float64), weight.detach().clone()
        expected = step_check.adamw_update(0.01, settings, step, weight.grad, old, *moments)
        optimizer.step()
        torch.testing.assert_close(weight.detach() - old, expected)
        moments = [optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq")]


RIGHT = StepCheck(loss=0.0, gradient=0.0, gradient_of="wte.weight", update=0.0, update_of="wpe.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": 0.1}, "the loss is off by 1.0e-01, where 1e-06 is allowed"),
        ({"gradient": 0.1}, "the gradient of wte.weight is off by 1.0e-01, where 1e-05 is allowed"),
        ({"update": 0.1}, "AdamW's update of wpe.weight is off by 1.0e-01, where 1e-05 is allowed"),
        ({"gradient": math.nan}, "the gradient of wte.weight is off by nan"),
    ],
)
def test_a_fault_stops_the_benchmark_with_one_line(change, message):
    result = replace(RIGHT, **change)
    assert result.fault("fp32").startswith(message)
    arm = SimpleNamespace(name="flash", run=lambda *_: result)
    with pytest.raises(UserError, match=f"level 'flash' computes a wrong step: {message}"):
        benchmark.check(arm, "fp32", BATCH, CPU, PARAMS)
    assert RIGHT.fault("fp32") is None
