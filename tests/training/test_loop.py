"""The loop computes what one written by hand computes, and times only the step."""

import itertools

import pytest
import torch

from gpt2_ladder.config import AdamW, Recipe
from gpt2_ladder.model import GPT
from gpt2_ladder.training import loop, runtime
from gpt2_ladder.training.metrics import Step
from helpers.common import random_ids, tiny

CPU = torch.device("cpu")
SETTINGS = AdamW(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def batches(count: int = 4) -> list[loop.Batch]:
    return [(random_ids(seed=2 * i), random_ids(seed=2 * i + 1)) for i in range(count)]


def test_the_losses_equal_those_of_a_loop_written_by_hand():
    model, expected = GPT(tiny()), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for x, y in batches():
        loss = torch.nn.functional.cross_entropy(model(x)[0].view(-1, 97), y.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    model = GPT(tiny())
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS)
    steps = loop.train(model, optimizer, batches(), runtime.set_precision("fp32", CPU), CPU, 2)
    assert [step.loss for step in steps] == pytest.approx(expected, abs=1e-6)


def test_parameters_gradients_and_optimizer_state_stay_float32_under_bf16():
    model = GPT(tiny())
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS)
    list(loop.train(model, optimizer, batches(2), runtime.set_precision("bf16", CPU), CPU, 2))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in states} == {torch.float32}


def test_the_learning_rate_rises_then_falls_along_a_cosine_to_a_tenth():
    cosine = Recipe(schedule="cosine", lr_warmup_steps=2)
    rates = [loop.learning_rate_at(step, 7, 2.0, cosine) for step in range(7)]
    # by hand: 1/2, 1, then 0.1 + 0.9 (1 + cos(pi k / 4)) / 2 for k = 0 ... 4, each times 2
    falling = [0.1 + 0.9 * (2 + 2**0.5) / 4, 0.55, 0.1 + 0.9 * (2 - 2**0.5) / 4, 0.1]
    assert rates == pytest.approx([2 * share for share in (0.5, 1.0, 1.0, *falling)])
    assert [loop.learning_rate_at(step, 7, 2.0, Recipe()) for step in range(7)] == [2.0] * 7
    assert loop.learning_rate_at(0, 1, 2.0, Recipe(schedule="cosine")) == 2.0


def test_weight_decay_can_exclude_biases_and_layernorms():
    model = GPT(tiny())
    matrices, vectors = loop.make_optimizer(model, 1e-2, SETTINGS, decay="matrices").param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def train_one(model: GPT, **changes: object) -> tuple[Step, torch.Tensor]:
    """Take a step of SGD with learning rate 1, and return it with its gradient: the change of the weights, negated."""
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (step,) = loop.train(model, optimizer, batches(1), runtime.set_precision("fp32", CPU), CPU, 2, **changes)
    return step, before - torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_gradient_is_clipped_and_its_norm_before_clipping_is_recorded():
    step, gradient = train_one(GPT(tiny()))
    assert step.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-4)
    clipped_step, clipped = train_one(GPT(tiny()), clip_norm=0.1)
    assert clipped_step.grad_norm == pytest.approx(step.grad_norm, rel=1e-6)
    assert clipped.norm().item() == pytest.approx(0.1, rel=1e-3)
    assert torch.allclose(clipped / clipped.norm(), gradient / gradient.norm(), atol=1e-4)


def test_every_step_gets_its_learning_rate():
    model, rates = GPT(tiny()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    autocast = runtime.set_precision("fp32", CPU)
    steps = loop.train(model, optimizer, batches(3), autocast, CPU, 2, 5, lambda step: step / 4)
    assert [step.step for step in steps] == [5, 6, 7]
    assert rates == [1.25, 1.5, 1.75]


def test_fused_adamw_is_used_and_updates_like_the_plain_one():
    plain, fused = GPT(tiny()), GPT(tiny())
    optimizers = [loop.make_optimizer(plain, 1e-2, SETTINGS), loop.make_optimizer(fused, 1e-2, SETTINGS, True)]
    assert [optimizer.defaults["fused"] for optimizer in optimizers] == [None, True]
    for model, optimizer in zip((plain, fused), optimizers, strict=True):
        generator = torch.Generator().manual_seed(0)  # gradients near zero would leave only rounding errors
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for name, parameter in plain.named_parameters():
        # the same operations in another order: a few last bits of weights near 1 after three steps
        assert torch.allclose(parameter, fused.get_parameter(name), atol=1e-6), name


def test_the_clock_stops_before_the_consumer_gets_the_step(monkeypatch):
    now = itertools.count()  # each call of the clock is one second later
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(now))
    model = GPT(tiny())
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS)
    steps = loop.train(model, optimizer, batches(3), runtime.set_precision("fp32", CPU), CPU, 2)
    for step in steps:
        assert step.step_ms == 1000
        assert step.tokens_per_second == 32
        next(now)  # the consumer takes a second


@pytest.mark.parametrize("micro_batch", [2, 1])
def test_evaluation_returns_the_mean_loss_and_changes_nothing(micro_batch):
    model = GPT(tiny())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    value = loop.evaluate(model, batches(3), runtime.set_precision("fp32", CPU), CPU, micro_batch)
    assert value == pytest.approx(sum(model(x, y)[1].item() for x, y in batches(3)) / 3, abs=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_evaluation_does_not_compile():
    model, compiled = GPT(tiny()), []
    model.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward, fullgraph=True)
    loop.evaluate(model, batches(1), runtime.set_precision("fp32", CPU), CPU, 2)
    assert compiled == []
    model(*batches(1)[0])
    assert len(compiled) == 1  # one graph, no break
