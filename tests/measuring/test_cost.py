"""Counted operations against numbers computed by hand and against the network's parameters; the peaks of GPUs."""

import re

import pytest

from gpt2_ladder.config import GPT2_VOCAB_SIZE, Size
from gpt2_ladder.measuring import cost
from gpt2_ladder.model import GPT
from helpers.common import tiny

SMALL = Size(n_layer=12, n_head=12, n_embd=768, n_positions=1024)


def test_gpt2_needs_855_million_operations_per_token():
    assert cost.flops_per_token(SMALL, 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 1024 * 768 == 855_166_464


def test_the_formula_counts_the_networks_parameters():
    config = tiny(vocab_size=GPT2_VOCAB_SIZE)
    multiplied = sum(p.numel() for name, p in GPT(config).named_parameters() if name != "wpe.weight")
    assert cost.flops_per_token(config, 16) == 6 * multiplied + 12 * 2 * 16 * 16


@pytest.mark.parametrize("name", cost.GPUS)
def test_a_gpus_peaks_are_dense_rates(name):
    """A figure "with sparsity" is twice a dense one, so bfloat16 would be 8 or 32 times as fast as float32."""
    bandwidth, peaks = cost.GPUS[name]
    assert list(peaks) in (["fp32", "fp16"], ["fp32", "tf32", "bf16"])
    assert 300 <= bandwidth <= 4900
    if "bf16" in peaks:
        assert peaks["bf16"] / peaks["tf32"] == pytest.approx(2, rel=0.02)
        times = peaks["bf16"] / peaks["fp32"]
        assert times == pytest.approx(2, rel=0.02) or times == pytest.approx(4, rel=0.02) or 13.9 < times < 16.1
        assert cost.KNOWN_PEAKS[name]["fp16"] == peaks["bf16"]  # data sheets give one number for both
    else:
        assert peaks["fp16"] / peaks["fp32"] == pytest.approx(8, rel=0.02)  # Volta and Turing, without float16's sums
    if "GeForce" in name:  # the rate with float32 accumulation is half of the rate that NVIDIA shows first
        assert peaks["tf32"] == peaks["fp32"]


def test_the_same_chip_has_similar_peaks_on_every_board():
    """The number of cores and the clock differ by less than a third; a figure "with sparsity" would stand out."""
    chips = (("A100", 312.0), ("H100|H200|GH200", 989.5))
    for pattern, expected in chips:
        found = [peaks["bf16"] for name, (_, peaks) in cost.GPUS.items() if re.search(pattern, name)]
        assert len(found) >= 4
        assert all(0.7 * expected < peak <= expected for peak in found)


def test_names_are_those_that_nvidia_smi_prints():
    assert all(re.match("Tesla |NVIDIA ", name) for name in cost.GPUS)
