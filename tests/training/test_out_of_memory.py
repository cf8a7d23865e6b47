"""When memory runs out, the micro-batch is halved and the loss curve stays the same; the probe finds what fits."""

import os
import resource
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2_ladder import params_yaml
from gpt2_ladder.config import AdamW, UserError
from gpt2_ladder.measuring import planning
from gpt2_ladder.model import GPT, count_bytes
from gpt2_ladder.params import Params
from gpt2_ladder.running.run import build
from gpt2_ladder.training import devices, loop, memory, runtime
from helpers.common import REPOSITORY, environment, random_ids, tiny
from helpers.memory import Capped
from pipeline import probe
from pipeline import train as train_stage

CPU = torch.device("cpu")
SETTINGS = AdamW(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
B, T, STEPS = 8, 32, 5
BATCHES = [(random_ids(B, T, seed=2 * i), random_ids(B, T, seed=2 * i + 1)) for i in range(STEPS)]


def train(memory: Capped | None = None, micro_batch: int = B, before_step: dict | None = None):
    """Train on BATCHES, with the cap `before_step[i]` from step i on, and return the steps and the weights."""
    model = GPT(tiny())
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS)
    autocast = runtime.set_precision("fp32", CPU)
    steps = []

    def batches():
        for index, batch in enumerate(BATCHES):
            if memory and before_step and index in before_step:
                memory.cap = before_step[index]
            yield batch

    with memory or nullcontext():
        steps += loop.train(model, optimizer, batches(), autocast, CPU, micro_batch)
    return steps, model.state_dict()


def peak(micro_batch: int) -> int:
    """Return the peak of live bytes in a training with this micro-batch."""
    memory = Capped(float("inf"))
    train(memory, micro_batch)
    return memory.peak


def assert_same(result, expected) -> None:
    """Compare steps and weights of two trainings that differ in the order of their float32 sums."""
    # five steps of AdamW at 1e-2 turn 1e-7 of a gradient into at most 1e-5 of a weight
    assert [step.loss for step in result[0]] == pytest.approx([step.loss for step in expected[0]], abs=1e-5)
    torch.testing.assert_close(result[1], expected[1], rtol=0, atol=1e-4)


def test_a_step_that_must_not_be_split_ends_the_training():
    model, memory = GPT(tiny()), Capped(peak(8) / 2)
    steps = loop.train(model, torch.optim.SGD(model.parameters()), BATCHES, nullcontext(), CPU, 8, may_halve=False)
    with (
        memory,
        pytest.raises(UserError, match=r"out of memory with 8 rows at a time .*; set cuda_graphs: false, or a smaller"),
    ):
        list(steps)
    assert memory.refused == 1


@pytest.mark.parametrize("micro_batch", [4, 3, 1])
def test_accumulated_gradients_train_like_the_whole_batch(micro_batch):
    parts = train(micro_batch=micro_batch)
    assert [step.micro_batch for step in parts[0]] == [micro_batch] * STEPS
    assert_same(parts, train())


def test_a_batch_that_does_not_fit_is_halved_until_it_does(capsys):
    memory = Capped((peak(4) + peak(2)) / 2)
    halved = train(memory)
    assert memory.refused == 2  # 8 rows, 4 rows
    assert [step.micro_batch for step in halved[0]] == [2] * STEPS
    assert [step.step for step in halved[0]] == list(range(STEPS))
    assert_same(halved, train())
    assert "out of memory with 8 rows at a time, continuing with 4 (CUDA out of memory" in capsys.readouterr().out


def test_memory_that_runs_out_later_halves_the_later_steps_only():
    halved = train(Capped(float("inf")), before_step={3: (peak(8) + peak(4)) / 2})
    assert [step.micro_batch for step in halved[0]] == [8, 8, 8, 4, 4]
    assert_same(halved, train())


def test_a_step_that_does_not_fit_comes_after_the_step_before_it(monkeypatch):
    log = list[str]()
    monkeypatch.setattr(memory, "halve", lambda *_: log.append("halve") or 4)
    read = loop.Launched.read
    monkeypatch.setattr(loop.Launched, "read", lambda step: log.append(f"step {step.index}") or read(step))
    train(Capped(float("inf")), before_step={3: (peak(8) + peak(4)) / 2})
    log = log[-6:]  # without those of peak()
    assert log == ["step 0", "step 1", "step 2", "halve", "step 3", "step 4"]


def test_the_step_that_did_not_fit_leaves_nothing_in_memory(monkeypatch):
    memory = Capped((peak(8) + peak(4)) / 2)
    # restart the measurement at the second attempt
    monkeypatch.setattr(devices, "reset_peak_memory", lambda _: setattr(memory, "peak", memory.live))
    train(memory)
    assert memory.refused == 1
    assert memory.peak <= peak(4)


def test_one_row_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match=r"with one row at a time \(CUDA out of memory.*`make plan` shows what fits"):
        train(Capped(peak(1) / 2))


def test_the_optimizers_step_is_never_repeated(monkeypatch):
    """If memory runs out there, some of the parameters may be updated already."""
    memory, make = Capped(float("inf")), loop.make_optimizer

    def make_optimizer(*args: object) -> torch.optim.Optimizer:
        optimizer = make(*args)
        optimizer.register_step_pre_hook(lambda *_: setattr(memory, "cap", memory.live))
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", make_optimizer)
    with pytest.raises(UserError, match="out of memory in the optimizer's step, which needs the same memory"):
        train(memory)
    assert memory.refused == 1


def test_other_errors_do_not_halve_the_micro_batch(monkeypatch):
    monkeypatch.setattr(loop, "accumulate", lambda *_: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train()


def tiny_params(block_size: int = 64) -> Params:
    params = params_yaml.load(REPOSITORY / "params.yaml")
    shape = params.machines["cpu"].model_copy(update={"batch_size": 8, "block_size": block_size})
    return params.model_copy(update={"model": "tiny", "machines": {"cpu": shape}})


LEVELS = {name: tiny_params().levels[name] for name in ("fp32", "padded")}


def need(rows: int, block_size: int = 64) -> int:
    """Return the bytes of an fp32 step with `rows` rows at a time, plus the weights of the padded level."""
    params = tiny_params()
    step = planning.trace_step(params.gpt(LEVELS["fp32"]), "fp32", rows, block_size, False, micro_batches=2)
    return step.peak_bytes + count_bytes(params.gpt(LEVELS["padded"]), 4)


@pytest.mark.slow
def test_the_probe_returns_the_whole_batch_or_a_smaller_one_that_fits():
    everything = Capped(float("inf"))
    with everything:
        assert probe.find_micro_batch(tiny_params(), LEVELS, CPU) == 8
    memory = Capped(everything.peak * 0.8)
    with memory:
        assert probe.find_micro_batch(tiny_params(), LEVELS, CPU) < 8
    assert memory.refused


@pytest.mark.slow
def test_the_probe_does_not_try_a_step_that_is_predicted_not_to_fit(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda _: need(4))
    tried, step = [], loop.timed_step
    monkeypatch.setattr(loop, "timed_step", lambda *args: tried.append(args[5]) or step(*args))
    assert probe.find_micro_batch(tiny_params(), LEVELS, CPU) <= 4
    assert max(tried) <= 4


@pytest.mark.slow
def test_the_probe_refuses_an_attention_kernel_that_the_device_lacks():
    levels = {"mine": LEVELS["fp32"].model_copy(update={"attention": "cudnn"})}
    with pytest.raises(UserError, match=r"attention: cudnn, but torch has no cudnn kernel .* on a CPU"):
        probe.find_micro_batch(tiny_params(), levels, CPU)


def test_a_failed_probe_reports_the_block_size_that_would_fit(monkeypatch):
    for free, fix in (
        (need(1, 32), "set machines.cpu.block_size: 32, which fits"),
        (1000, "not even one token fits: free memory, or set model: tiny"),
    ):
        monkeypatch.setattr(devices, "free_memory", lambda _, free=free: free)
        message = f"level 'fp32', 0.[01] GiB free: one row is predicted not to fit; {fix}"
        with pytest.raises(UserError, match=message):
            probe.find_micro_batch(tiny_params(), LEVELS, CPU)


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_of_a_network_are_computed_from_its_config(tied, attention):
    model = GPT(tiny(tie_weights=tied, attention=attention))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    masks = sum(buffer.numel() for buffer in model.buffers())  # bool
    assert count_bytes(model.config, 3) == 3 * 4 * parameters + masks
    assert (masks > 0) == (attention == "eager")


def test_a_network_larger_than_the_memory_is_refused_before_it_is_built(monkeypatch):
    params = tiny_params()
    level = params.levels["fp32"].model_copy(update={"vocab_size": 10**12})
    job = replace(train_stage.make_job(params, "fp32"), switches=level)
    monkeypatch.setattr(devices, "free_memory", lambda _: 24 * 10**9)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda _: pytest.fail("built the network"))
    # 4 float32 numbers for each of 64 * 10**12 weights
    message = r"training tiny with vocab_size 1000000000000 needs 1,024,000\.0 GB of memory, 24\.0 GB are free: free"
    with pytest.raises(UserError, match=message):
        build(job, params, environment(), 2)


def test_a_batch_larger_than_the_memory_is_refused_before_it_is_made():
    params = tiny_params()
    shape = params.machines["cpu"].model_copy(update={"batch_size": 10**12})
    message = r"level 'fp32', .*: a step of 1000000000000 x 64 tokens, .* needs over [0-9,]+ GiB"
    with pytest.raises(UserError, match=message):
        probe.find_micro_batch(params.model_copy(update={"machines": {"cpu": shape}}), LEVELS, CPU)


def test_a_cpu_that_refuses_memory_halves_the_micro_batch(capsys):
    model = GPT(tiny(vocab_size=50257, n_positions=128))
    optimizer = loop.make_optimizer(model, 1e-3, SETTINGS)
    batch = random_ids(8, 128), random_ids(8, 128, seed=1)
    autocast = runtime.set_precision("fp32", CPU)
    loop.train_step(model, optimizer, batch, autocast, CPU, 1)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    # room for one copy of the float32 logits, 8 * 128 * 50257 * 4 bytes; a step needs several
    resource.setrlimit(resource.RLIMIT_AS, (address_space + 200 * 2**20, before[1]))
    try:
        (step,) = loop.train(model, optimizer, [batch], autocast, CPU, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert 1 <= step.micro_batch < 8
    assert 10 < step.loss < 12
    output = capsys.readouterr().out
    assert "continuing with 4" in output
    assert "can't allocate memory" in output
