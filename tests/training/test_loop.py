"""The loop computes what one written by hand computes, and times only the step."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext, suppress
from unittest import mock

import pytest
import torch

from gpt2_ladder.config import AdamW, Recipe
from gpt2_ladder.model import GPT
from gpt2_ladder.training import devices, loop, metrics, runtime
from gpt2_ladder.training.metrics import Step
from helpers import processes
from helpers.common import random_ids, tiny
from helpers.fake_gpu import CUDA, FakeGPU

CPU = torch.device("cpu")
SETTINGS = AdamW(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def batches(count: int = 4) -> list[loop.Batch]:
    return [(random_ids(seed=2 * i), random_ids(seed=2 * i + 1)) for i in range(count)]


def test_the_losses_equal_those_of_a_loop_written_by_hand():
    model, expected, two_epochs = GPT(tiny()), [], 2 * batches()  # a batch has another loss in the second epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for x, y in two_epochs:
        loss = torch.nn.functional.cross_entropy(model(x)[0].view(-1, 97), y.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    model = GPT(tiny())
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS)
    steps = loop.train(model, optimizer, two_epochs, runtime.set_precision("fp32", CPU), CPU, 2)
    assert [step.loss for step in steps] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_our_adamw_gives_the_bits_of_torchs(fused):
    ours, theirs = GPT(tiny()), GPT(tiny())
    about = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": fused or None}
    pairs = (
        (ours, loop.make_optimizer(ours, 1e-2, SETTINGS, fused)),
        (theirs, torch.optim.AdamW(theirs.parameters(), **about)),
    )
    for model, optimizer in pairs:
        list(loop.train(model, optimizer, batches(), runtime.set_precision("fp32", CPU), CPU, 2))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_training_without_compilation_does_not_import_dynamo():
    code = """if True:
        import sys, torch
        from gpt2_ladder.config import AdamW, GPTConfig
        from gpt2_ladder.model import GPT
        from gpt2_ladder.training import devices, loop, runtime
        device, ids = devices.open_device("cpu", 1, 0, False), torch.zeros(2, 8, dtype=torch.int64)
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=97))
        optimizer = loop.make_optimizer(model, 1e-2, AdamW(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1))
        autocast, batches = runtime.set_precision("bf16", device), [(ids, ids)]
        list(loop.train(model, optimizer, batches, autocast, device, 2))
        loop.evaluate(model, batches, autocast, device, 2)
        print("torch._dynamo" in sys.modules)
    """
    assert processes.run(code) == "False\n"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_parameters_gradients_and_optimizer_state_stay_float32_under_autocast(precision):
    model = GPT(tiny())
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS)
    list(loop.train(model, optimizer, batches(2), runtime.set_precision(precision, CPU), CPU, 2))
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


def train_with_clock(monkeypatch: pytest.MonkeyPatch, **options: object) -> list[Step]:
    """Train three steps of one second each; the caller takes ten seconds with every one of them."""
    now, steps = itertools.count(), list[Step]()
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(now))  # each call is one second later
    model = GPT(tiny())
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS)
    for step in loop.train(model, optimizer, batches(3), runtime.set_precision("fp32", CPU), CPU, 2, **options):
        steps.append(step)
        list(itertools.islice(now, 10))
    return steps


def test_the_clock_of_a_step_that_waited_for_the_caller_starts_with_the_step(monkeypatch):
    steps = train_with_clock(monkeypatch, settle=lambda _: True)
    assert [step.step_ms for step in steps] == [1000] * 3
    assert [step.tokens_per_second for step in steps] == [32] * 3
    assert [step.seconds for step in steps] == [2, 14, 26]
    assert metrics.goodput(steps, 32) == 2 * 32 / 24  # with the pauses between the steps
    assert metrics.goodput(steps[:1], 32) is None


def test_otherwise_a_step_lasts_from_the_end_of_the_step_before_to_its_own(monkeypatch):
    steps = train_with_clock(monkeypatch)
    # the caller gets step 0 after step 1 has been launched
    assert [step.step_ms for step in steps] == [1000, 1000, 11000]


def test_a_timed_step_lasts_from_an_idle_gpu_to_an_idle_gpu(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(devices, "send", lambda batch, device: gpu.launch(3.0) or batch)
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: gpu.launch(10.0))
    for _ in range(3):
        gpu.launch(5.0)  # of another level
        assert loop.timed_step(GPT(tiny()), None, batches(1)[0], nullcontext(), CUDA, 2) == 10_000


@pytest.mark.parametrize("settled", [None, 2])
def test_a_training_on_a_gpu_reports_times_and_losses_of_finished_steps(monkeypatch, settled):
    gpu, losses, steps = FakeGPU(monkeypatch), itertools.count(), list[Step]()

    def train_step(*_: object) -> tuple[object, object]:
        gpu.launch(10.0)
        gpu.now += 0.5  # which the host needs to launch a step
        return gpu.number(next(losses)), gpu.number(1.0)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(devices, "send", lambda batch, device: batch)
    training = loop.train(GPT(tiny()), None, batches(4), nullcontext(), CUDA, 2, settle=lambda n: n == settled)
    for step in training:
        steps.append(step)
        gpu.now += 1.0  # the caller's second
    assert [step.step_ms for step in steps] == [10_000] * 4
    assert [(step.loss, step.grad_norm) for step in steps] == [(index, 1) for index in range(4)]
    # after two steps, the GPU waits for the caller for a second
    assert [step.seconds for step in steps] == ([10, 20, 30, 40] if settled is None else [10, 20, 31, 41])


def events(settle: Callable[[int], bool], fault: int | None = None) -> list[str]:
    """Return what happens in a training of four steps, in order; step `fault` raises an error."""
    log, model = list[str](), GPT(tiny())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    launched = itertools.count()

    def launch(*_: object) -> None:
        number = next(launched)
        log.append(f"launch {number}")
        if number == fault:
            raise ArithmeticError

    optimizer.register_step_pre_hook(launch)
    read = devices.Reading.read

    def logged(reading: devices.Reading) -> list[float]:
        log.append("read")
        return read(reading)

    steps = loop.train(model, optimizer, batches(4), runtime.set_precision("fp32", CPU), CPU, 2, settle=settle)
    with mock.patch.object(devices.Reading, "read", logged), suppress(ArithmeticError):
        log.extend(f"got {step.step}" for step in steps)
    return log


def test_a_step_is_launched_before_the_previous_one_is_read():
    assert " ".join(events(lambda _: False)) == (
        "launch 0 launch 1 read got 0 launch 2 read got 1 launch 3 read got 2 read got 3"
    )


def test_a_step_whose_weights_are_used_is_read_before_the_next_one_is_launched():
    assert " ".join(events(lambda steps: steps == 2)) == (
        "launch 0 launch 1 read got 0 read got 1 launch 2 launch 3 read got 2 read got 3"
    )


def test_the_steps_before_an_error_are_read_first():
    assert " ".join(events(lambda _: False, fault=2)) == "launch 0 launch 1 read got 0 launch 2 read got 1"


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
