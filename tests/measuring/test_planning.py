"""Predictions against arithmetic, torch's allocator, and independent predictions for GPUs."""

import re

import pytest
import torch

from experiments.memory import allocated_peak
from gpt2_ladder.config import GPTConfig, UserError
from gpt2_ladder.measuring import planning

GIB = 2**30
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 256, "vocab_size": 50257}
MID = {"n_layer": 4, "n_head": 8, "n_embd": 512, "n_positions": 256, "vocab_size": 50257}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
LOGITS = 16 * 1024 * 50257 * 4 / GIB


def gpt2_step(batch_size: int = 16, precision: str = "bf16", **changes: object) -> planning.Step:
    """A step of GPT-2 at T=1024 on a GPU."""
    return planning.trace_step(GPTConfig(**{**GPT2, **changes}), precision, batch_size, 1024, cuda=True)


def flops(operations: tuple[planning.Operation, ...]) -> int:
    return sum(operation.flops for operation in operations)


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"vocab_size": 10**12}, (16 * 768 + 16 * 1024) * 10**12),  # weights and AdamW's state, a byte of each logit
        ({"n_embd": 12 * 10**8}, 12 * 16 * 12 * (12 * 10**8) ** 2),
        ({"n_positions": 10**9}, 12 * 10**18),  # masks
        ({"batch_size": 10**12}, 10**12 * 1024 * (50257 + 12 * 1024)),  # a byte of each logit and score
    ],
)
def test_a_step_too_large_for_any_machine_is_refused_before_tracing(changes, least):
    with pytest.raises(UserError, match=r"x 1024 tokens, n_layer .* needs over [\d,]+ GiB of memory; lower") as caught:
        gpt2_step(**changes)
    gib = int(re.search(r"over ([\d,]+) GiB", str(caught.value))[1].replace(",", ""))
    assert gib == pytest.approx(least / GIB, rel=0.01)


def test_live_storages_are_counted_once_until_they_are_freed():
    with planning.LiveStorage() as storage:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        assert storage.live == 4000
        c = b + 1
        assert (storage.live, storage.peak) == (8000, 8000)
        del a, b
        assert (storage.live, storage.peak) == (4000, 8000)
        c.mul_(2)
        assert storage.live == 4000
    # zeros, the sum and the product in place move bytes; a view moves none
    moved = [operation.bytes for operation in storage.operations]
    assert moved[-2:] == [8000, 4000]
    assert len(moved) in (3, 4)  # zeros may be recorded as empty and zero_


def test_a_named_attention_kernel_needs_the_memory_of_flash():
    assert gpt2_step(attention="cudnn").peak_bytes == gpt2_step(attention="flash").peak_bytes


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "shape"), [(TINY, (4, 128)), pytest.param(MID, (2, 256), marks=pytest.mark.slow)], ids=["tiny", "mid"]
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
    """The figures are from torch.distributed's MemTracker on fake tensors, whose float32 step kept the logits."""
    step = gpt2_step(batch_size, precision, attention=attention)
    assert step.peak_bytes / GIB == pytest.approx(gib, abs=0.06)


def test_a_chunked_loss_holds_a_quarter_of_the_logits_at_the_peak():
    plain, chunked = (gpt2_step(attention="flash", chunked_loss=chunked) for chunked in (False, True))
    # logits in bfloat16 and float32, and the gradients of both: 12 bytes each, of which three of four chunks are saved
    saved = (plain.peak_bytes - chunked.peak_bytes) / (16 * 1024 * 50257)
    assert 3 / 4 * 8 < saved < 12, saved


def test_a_checkpointed_block_keeps_only_its_input():
    four, six = (
        gpt2_step(n_layer=layers, attention="flash", activation_checkpointing=True).peak_bytes for layers in (4, 6)
    )
    parameters, residual = 12 * 768**2 + 13 * 768, 16 * 1024 * 768
    # the peak is at the logits, before any gradient: float32 weights, AdamW's two moments and the block's input, and
    # AdamW's step counters of 12 tensors
    assert (six - four) / 2 == 12 * parameters + 4 * residual + 4 * 12


def test_a_checkpointed_softmax_has_the_same_type_in_backward():
    """CUDA's autocast computes it in float32, and a checkpoint refuses to repeat it in another type."""
    plain, checkpointed = (gpt2_step(4, activation_checkpointing=again) for again in (False, True))
    assert checkpointed.peak_bytes < plain.peak_bytes / 2
    head, last = 2 * 768 * 50257, 12 * 8 * 768**2  # backward repeats neither the head nor a block's last product
    repeated = flops(plain.network) / 3 - 4 * 1024 * (head + last)
    assert flops(checkpointed.network) - flops(plain.network) == pytest.approx(repeated, rel=1e-3)


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_row_does_not():
    config, free = GPTConfig(**GPT2), 24 * GIB
    largest = planning.largest_batch(config, "fp32", 1024, True, free)
    assert gpt2_step(largest, "fp32").peak_bytes <= 0.9 * free - GIB < gpt2_step(largest + 1, "fp32").peak_bytes
    assert planning.largest_batch(config, "fp32", 1024, True, 2 * GIB) == 0


@pytest.mark.parametrize(
    ("attention", "precision", "a100_ms", "h100_ms"),
    [("eager", "fp32", 819, 272), ("eager", "tf32", 211, 107), ("eager", "bf16", 163, 89), ("flash", "bf16", 80, 37)],
)
def test_the_roofline_of_gpt2_agrees_with_an_independent_count(attention, precision, a100_ms, h100_ms):
    """The figures, at B=16, T=1024, were counted without this code."""
    step = gpt2_step(precision=precision, attention=attention)
    for gpu, expected in (("NVIDIA A100-SXM4-80GB", a100_ms), ("NVIDIA H100 80GB HBM3", h100_ms)):
        least = planning.least_ms(step, gpu, precision, compiled=False)
        assert least == pytest.approx(expected, rel=0.05)
        assert planning.least_ms(step, gpu, precision, compiled=True) < least
    assert planning.least_ms(step, "NVIDIA X", precision, compiled=False) is None
    assert planning.least_ms(step, "Tesla T4", "tf32", compiled=False) is None


@pytest.mark.parametrize(("attention", "mflops"), [("eager", 854.4), ("flash", 807.3)])
def test_the_traced_products_agree_with_the_formula(attention, mflops):
    """A flash kernel skips half of attention's square."""
    step = gpt2_step(4, attention=attention)
    assert flops(step.network) / (4 * 1024) / 1e6 == pytest.approx(mflops, rel=1e-3)
    assert flops(step.optimizer) == 0
