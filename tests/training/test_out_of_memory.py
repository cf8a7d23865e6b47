"""Memory runs out by injection, past a cap on live storage, and once for real: the loss curve does not notice."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from gpt2_ladder import config, params_yaml
from gpt2_ladder.config import AdamW, UserError
from gpt2_ladder.measuring import planning
from gpt2_ladder.model import GPT, count_bytes
from gpt2_ladder.running.run import build
from gpt2_ladder.training import devices, loop, runtime
from helpers import processes
from helpers.common import REPOSITORY, environment, random_ids, tiny
from helpers.memory import Capped
from pipeline import probe
from pipeline import train as train_stage

CPU = torch.device("cpu")
SETTINGS = AdamW(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
B, T, STEPS = 8, 32, 5
BATCHES = [(random_ids(B, T, seed=2 * i), random_ids(B, T, seed=2 * i + 1)) for i in range(STEPS)]


def train(memory: Capped | None = None, micro_batch: int = B, before_step: dict | None = None):
    """Train STEPS steps, the cap changed before the steps named in `before_step`; return steps and weights."""
    model = GPT(tiny())
    optimizer = loop.make_optimizer(model, 1e-2, SETTINGS)
    autocast = runtime.set_precision("fp32", CPU)
    steps = []
    with memory or nullcontext():
        for step in loop.train(model, optimizer, BATCHES, autocast, CPU, micro_batch):
            steps.append(step)
            if memory and before_step and step.step + 1 in before_step:
                memory.cap = before_step[step.step + 1]
    return steps, model.state_dict()


def peak(micro_batch: int) -> int:
    """The most bytes that a training with this micro-batch has alive."""
    memory = Capped(float("inf"))
    train(memory, micro_batch)
    return memory.peak


@pytest.mark.parametrize("micro_batch", [4, 3, 1])
def test_accumulated_gradients_train_as_the_whole_batch_does(micro_batch):
    (whole, weights), (parts, others) = train(), train(micro_batch=micro_batch)
    assert [step.micro_batch for step in parts] == [micro_batch] * STEPS
    # float32: another order of sums; five steps of AdamW at 1e-2 make 1e-7 of a gradient at most 1e-5 of a weight
    assert [step.loss for step in parts] == pytest.approx([step.loss for step in whole], abs=1e-5)
    torch.testing.assert_close(others, weights, rtol=0, atol=1e-4)


def test_a_gradient_that_is_not_scaled_by_its_share_would_be_found(monkeypatch):
    (whole, _), split = train(), loop.split
    monkeypatch.setattr(loop, "split", lambda batch, rows: ((x, y, 1.0) for x, y, _ in split(batch, rows)))
    wrong, _ = train(micro_batch=4)
    assert [step.loss for step in wrong] != pytest.approx([step.loss for step in whole], abs=1e-5)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(capsys):
    memory = Capped((peak(4) + peak(2)) / 2)
    steps, _ = train(memory)
    assert memory.refused == 2  # 8 rows, 4 rows
    assert [step.micro_batch for step in steps] == [2] * STEPS
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in train()[0]], abs=1e-5)
    assert [step.step for step in steps] == list(range(STEPS))
    assert "out of memory with 8 rows at a time, trying 4 (CUDA out of memory" in capsys.readouterr().out


def test_memory_that_runs_out_in_the_middle_halves_from_there_on():
    steps, weights = train(Capped(float("inf")), before_step={3: (peak(8) + peak(4)) / 2})
    assert [step.micro_batch for step in steps] == [8, 8, 8, 4, 4]
    whole, others = train()
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in whole], abs=1e-5)
    torch.testing.assert_close(weights, others, rtol=0, atol=1e-4)


def test_nothing_is_kept_of_the_step_that_did_not_fit(monkeypatch):
    """Counted from the second attempt on."""
    memory = Capped((peak(8) + peak(4)) / 2)
    monkeypatch.setattr(loop, "reset_peak_memory", lambda _: setattr(memory, "peak", memory.live))
    train(memory)
    assert memory.refused == 1
    assert memory.peak <= peak(4)


def test_an_error_kept_with_its_traceback_would_be_found(monkeypatch):
    """It pins the activations of the step that did not fit, so that no smaller one fits either."""
    kept: list[Exception] = []
    monkeypatch.setattr(loop, "is_out_of_memory", lambda error: kept.append(error) or True)
    with pytest.raises(UserError, match="out of memory with one row"):
        train(Capped((peak(8) + peak(4)) / 2))


def test_one_row_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match=r"out of memory with one row at a time \(CUDA out of memory.*`make plan` says"):
        train(Capped(peak(1) / 2))


def test_the_optimizers_step_is_never_taken_twice(monkeypatch):
    """Half of the parameters may be updated when memory runs out there: no smaller micro-batch mends that."""
    memory = Capped(float("inf"))

    def full_from_here(*_: object) -> None:
        memory.cap = memory.live

    make = loop.make_optimizer

    def make_optimizer(*arguments: object) -> torch.optim.Optimizer:
        optimizer = make(*arguments)
        optimizer.register_step_pre_hook(full_from_here)
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", make_optimizer)
    with pytest.raises(UserError, match="out of memory in the optimizer's step, which no smaller micro-batch makes"):
        train(memory)
    assert memory.refused == 1


def test_another_error_is_no_reason_to_halve(monkeypatch):
    monkeypatch.setattr(loop, "accumulate", lambda *_: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train()


def tiny_params(block_size: int = 64) -> config.Params:
    params = params_yaml.load(REPOSITORY / "params.yaml")
    shape = params.machines["cpu"].model_copy(update={"batch_size": 8, "block_size": block_size})
    return params.model_copy(update={"model": "tiny", "machines": {"cpu": shape}})


LEVELS = {name: tiny_params().levels[name] for name in ("fp32", "bf16", "flash", "padded")}


def need(rows: int, block_size: int = 64) -> int:
    """What the fp32 level takes that accumulates so many rows at a time, with the padded level's weights beside it."""
    params = tiny_params()
    step = planning.trace_step(params.gpt(LEVELS["fp32"]), "fp32", rows, block_size, False, micro_batches=2)
    return step.peak_bytes + count_bytes(params.gpt(LEVELS["padded"]), 4)


def test_the_probe_keeps_the_whole_batch_where_it_fits():
    assert probe.find_micro_batch(tiny_params(), LEVELS, CPU) == 8


def test_the_probe_finds_one_micro_batch_for_all_levels_by_taking_a_step():
    everything = Capped(float("inf"))
    with everything:
        probe.find_micro_batch(tiny_params(), LEVELS, CPU)
    memory = Capped(everything.peak * 0.8)
    with memory:
        assert probe.find_micro_batch(tiny_params(), LEVELS, CPU) < 8
    assert memory.refused


def test_the_probe_does_not_try_what_is_predicted_not_to_fit(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda _: need(4))
    tried = []
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *call: tried.append(call[-1]) or step(*call))
    assert probe.find_micro_batch(tiny_params(), LEVELS, CPU) <= 4
    assert max(tried) <= 4


@pytest.mark.parametrize("free", ["row", "nothing"])
def test_a_probe_that_fails_says_what_would_fit(monkeypatch, free):
    memory = need(1, 32) if free == "row" else 1000
    monkeypatch.setattr(devices, "free_memory", lambda _: memory)
    mend = "machines.cpu.block_size: 32 would fit" if free == "row" else "not even one token would fit"
    with pytest.raises(UserError, match=f"level 'fp32', 0.[01] GiB free: one row is predicted to be too much; {mend}"):
        probe.find_micro_batch(tiny_params(), LEVELS, CPU)


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_networks_bytes_are_counted_without_making_it(tied, attention):
    model = GPT(tiny(tie_weights=tied, attention=attention))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    masks = sum(buffer.numel() for buffer in model.buffers())  # bool
    assert count_bytes(model.config, 3) == 3 * 4 * parameters + masks
    assert (masks > 0) == (attention == "eager")


def params_of(**sizes: int) -> config.Params:
    size = params_yaml.load(REPOSITORY / "params.yaml").models["tiny"].model_copy(update=sizes)
    return tiny_params().model_copy(update={"models": {"tiny": size}})


@pytest.mark.parametrize(
    ("vocab_size", "sizes", "need"),
    [
        (10**12, {}, r"1,024,000\.0"),  # 4 float32 numbers for each of 64 * 10**12 weights
        (50257, {"n_embd": 10**8}, r"3,840,082,094\.4"),  # and of 24 * 10**16
        (50257, {"n_positions": 10**9}, r"2,000,001,024\.1"),  # two masks of 10**18 bytes
    ],
)
def test_sizes_that_no_memory_holds_are_refused_with_what_they_need(monkeypatch, vocab_size, sizes, need):
    params = params_of(**sizes)
    level = params.levels["fp32"].model_copy(update={"vocab_size": vocab_size})
    job = replace(train_stage.make_job(params, "fp32"), switches=level)
    monkeypatch.setattr(devices, "free_memory", lambda _: 24 * 10**9)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda _: pytest.fail("memory was taken for the network"))
    message = rf"training tiny with vocab_size {vocab_size} needs {need} GB of memory, 24\.0 GB are free: free"
    with pytest.raises(UserError, match=message):
        build(job, params, environment(), 2)


def test_a_batch_that_no_memory_holds_is_refused_before_it_is_made():
    params = tiny_params()
    shape = params.machines["cpu"].model_copy(update={"batch_size": 10**12})
    with pytest.raises(
        UserError, match=r"level 'fp32', .*: a step of 1000000000000 x 64 tokens, .* takes over [0-9,]+ GiB"
    ):
        probe.find_micro_batch(params.model_copy(update={"machines": {"cpu": shape}}), LEVELS, CPU)


REALLY = """
import json, resource, sys
import torch
from gpt2_ladder.config import AdamW
from gpt2_ladder.model import GPT
from gpt2_ladder.training import loop, runtime
from helpers.common import random_ids, tiny
CPU, SETTINGS = torch.device("cpu"), AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
model = GPT(tiny(n_positions=256, vocab_size=50257, n_embd=64))
optimizer = loop.make_optimizer(model, 1e-3, SETTINGS)
batch = random_ids(16, 256), random_ids(16, 256, seed=1)
autocast = runtime.set_precision("fp32", CPU)
loop.train_step(model, optimizer, batch, autocast, CPU, 1)
address_space = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (address_space + 800 * 2**20, -1))  # 16 rows of float32 logits: 785 MiB each
print(json.dumps([(s.loss, s.micro_batch) for s in loop.train(model, optimizer, [batch], autocast, CPU, 16)]))
"""


@pytest.mark.slow
def test_a_cpu_that_refuses_memory_halves_too():
    output = processes.run(REALLY)
    ((loss, micro_batch),) = json.loads(output.splitlines()[-1])
    assert 1 <= micro_batch < 16
    assert 10 < loss < 12
    assert "on with 8" in output
    assert "can't allocate memory" in output
