"""Predictions against arithmetic, against torch's allocator, and against what others predicted for GPUs."""

import re
from contextlib import nullcontext

import pytest
import torch

from experiments.memory import allocated_peak
from gpt2_ladder.config import GPTConfig, UserError
from gpt2_ladder.measuring import planning
from helpers.common import tiny

GIB = 2**30
MID = {"n_layer": 4, "n_head": 8, "n_embd": 512, "n_positions": 256, "vocab_size": 50257}
LOGITS = 16 * 1024 * 50257 * 4 / GIB
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}


def gpt2_step(batch_size: int = 16, precision: str = "bf16", **changes: object) -> planning.Step:
    """A step of GPT-2 at T=1024 on a GPU."""
    return planning.trace_step(GPTConfig(**{**GPT2, **changes}), precision, batch_size, 1024, cuda=True)


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"vocab_size": 10**12}, (16 * 768 + 16 * 1024) * 10**12),  # weights and AdamW's state, a byte of each logit
        ({"n_embd": 12 * 10**8}, 12 * 16 * 12 * (12 * 10**8) ** 2),
        ({"n_positions": 10**9}, 12 * 10**18),  # masks
        ({"batch_size": 10**12}, 10**12 * 1024 * (50257 + 12 * 1024)),  # a byte of each logit and score
    ],
)
def test_a_step_that_no_machine_can_take_is_refused_before_it_is_traced(changes, least):
    with pytest.raises(UserError, match=r"x 1024 tokens, n_layer .* takes over [\d,]+ GiB of memory; lower") as caught:
        gpt2_step(**changes)
    gib = int(re.search(r"over ([\d,]+) GiB", str(caught.value))[1].replace(",", ""))
    assert gib == pytest.approx(least / GIB, rel=0.01)


def test_what_is_alive_is_counted_once_and_forgotten():
    with planning.LiveStorage() as seen:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        assert seen.live == 4000
        c = b + 1
        assert (seen.live, seen.peak) == (8000, 8000)
        del a, b
        assert (seen.live, seen.peak) == (4000, 8000)
        c.mul_(2)
        assert seen.live == 4000
    # zeros, the sum and the product in place move bytes; a view moves none
    moved = [operation.bytes for operation in seen.operations]
    assert moved[-2:] == [8000, 4000]
    assert len(moved) in (3, 4)  # zeros may be empty and zero_


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fake_step_holds_what_a_real_one_holds(monkeypatch, attention, precision):
    config = tiny(attention=attention, n_positions=64)
    fake = planning.trace_step.__wrapped__(config, precision, 4, 64, cuda=False)
    monkeypatch.setattr(planning, "FakeTensorMode", nullcontext)
    real = planning.trace_step.__wrapped__(config, precision, 4, 64, cuda=False)
    assert fake.peak_bytes == real.peak_bytes
    assert [one.flops for one in fake.network] == [one.flops for one in real.network]


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 256, "vocab_size": 50257}, (4, 128)),
        (MID, (2, 256)),
    ],
    ids=["tiny", "mid"],
)
def test_the_predicted_peak_is_what_torch_allocates(sizes, shape, precision, attention):
    config = GPTConfig(**sizes, attention=attention)
    measured = allocated_peak(config, precision, *shape)
    assert planning.trace_step(config, precision, *shape, cuda=False).peak_bytes == pytest.approx(measured, rel=0.01)
    one_row_more = planning.trace_step(config, precision, shape[0] + 1, shape[1], cuda=False).peak_bytes
    assert one_row_more != pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("attention", "precision", "batch_size", "gib"),
    [
        ("eager", "fp32", 16, 31.8 - LOGITS),
        ("eager", "fp32", 4, 9.0 - LOGITS / 4),
        ("eager", "bf16", 16, 29.5),
        ("eager", "bf16", 4, 8.6),
        ("flash", "bf16", 16, 16.0),
        ("flash", "bf16", 4, 5.2),
    ],
)
def test_gpt2_on_a_gpu_needs_what_torchs_own_tracker_predicts(attention, precision, batch_size, gib):
    """The figures are of torch.distributed's MemTracker, on fake tensors too; its float32 step kept the logits."""
    step = gpt2_step(batch_size, precision, attention=attention)
    assert step.peak_bytes / GIB == pytest.approx(gib, abs=0.06)


def test_a_chunked_loss_holds_a_quarter_of_the_logits_at_the_peak():
    plain, chunked = (gpt2_step(attention="flash", chunked_loss=chunked) for chunked in (False, True))
    logits = 16 * 1024 * 50257  # bfloat16 and float32 ones, and the gradients of both: 12 bytes of each at once
    spared = (plain.peak_bytes - chunked.peak_bytes) / logits
    assert 3 / 4 * 8 < spared < 12, spared  # three of four pieces of two at least, and no more than there is


def test_a_checkpointed_block_holds_its_input_and_nothing_else():
    peaks = [
        gpt2_step(n_layer=layers, attention="flash", activation_checkpointing=True).peak_bytes for layers in (4, 6)
    ]
    parameters, residual = 12 * 768**2 + 13 * 768, 16 * 1024 * 768
    # the peak is at the logits, before any gradient: weights and AdamW's two moments, the input, all in float32, and
    # AdamW's step counters of 12 tensors
    assert (peaks[1] - peaks[0]) / 2 == 12 * parameters + 4 * residual + 4 * 12


def test_a_checkpointed_softmax_is_as_wide_in_backward_as_in_forward():
    """On CUDA autocast takes it in float32, and a checkpoint refuses to compute anything else than it did before."""
    plain, checkpointed = (gpt2_step(4, activation_checkpointing=again) for again in (False, True))
    assert checkpointed.peak_bytes < plain.peak_bytes / 2
    products = [sum(one.flops for one in step.network) for step in (plain, checkpointed)]
    tokens = 4 * 1024
    head, last = 2 * 768 * 50257, 12 * 8 * 768**2  # no block, and a block's last product, which backward does not need
    assert products[1] - products[0] == pytest.approx(products[0] / 3 - tokens * (head + last), rel=1e-3)


def test_the_largest_batch_fits_and_one_more_row_does_not():
    config, free = GPTConfig(**GPT2), 24 * GIB
    largest = planning.largest_batch(config, "fp32", 1024, True, free)
    assert gpt2_step(largest, "fp32").peak_bytes <= 0.9 * free - GIB < gpt2_step(largest + 1, "fp32").peak_bytes
    assert planning.largest_batch(config, "fp32", 1024, True, 2 * GIB) == 0


@pytest.mark.parametrize(
    ("attention", "precision", "ms"),
    [
        ("eager", "fp32", (819, 272)),
        ("eager", "tf32", (211, 107)),
        ("eager", "bf16", (163, 89)),
        ("flash", "bf16", (80, 37)),
    ],
)
def test_the_roofline_of_gpt2_is_that_of_an_independent_count(attention, precision, ms):
    """At B=16, T=1024 on A100-80 and H100, as an earlier count, independent of this code, gave it."""
    step = gpt2_step(precision=precision, attention=attention)
    for gpu, expected in zip(("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"), ms, strict=True):
        found = planning.least_ms(step, gpu, precision, compiled=False)
        assert found == pytest.approx(expected, rel=0.05)
        assert planning.least_ms(step, gpu, precision, compiled=True) < found
    assert planning.least_ms(step, "NVIDIA X", precision, compiled=False) is None
    assert planning.least_ms(step, "Tesla T4", "tf32", compiled=False) is None


def test_the_traced_products_are_those_of_the_formula():
    """854.4 MFLOP a token at T=1024 with both triangles of attention, half of it where a flash kernel skips one."""
    for attention, expected in (("eager", 854.4), ("flash", 807.3)):
        step = gpt2_step(4, attention=attention)
        assert sum(one.flops for one in step.network) / (4 * 1024) / 1e6 == pytest.approx(expected, rel=1e-3)
    assert sum(one.flops for one in step.optimizer) == 0
