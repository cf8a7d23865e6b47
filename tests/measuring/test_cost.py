"""Arithmetic, against numbers computed by hand and the network itself."""

from gpt2_ladder.config import GPT2_VOCAB_SIZE, Size
from gpt2_ladder.measuring import cost
from gpt2_ladder.model import GPT
from helpers.common import tiny

SMALL = Size(n_layer=12, n_head=12, n_embd=768, n_positions=1024)


def test_gpt2_costs_855_million_operations_a_token():
    assert cost.flops_per_token(SMALL, 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 1024 * 768 == 855_166_464


def test_the_parameters_in_the_formula_are_the_networks():
    config = tiny(vocab_size=GPT2_VOCAB_SIZE)
    multiplied = sum(p.numel() for name, p in GPT(config).named_parameters() if name != "wpe.weight")
    assert cost.flops_per_token(config, 16) == 6 * multiplied + 12 * 2 * 16 * 16


def test_peaks_are_the_dense_ones():
    assert cost.KNOWN_PEAKS["NVIDIA A100-SXM4-80GB"] == {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0}
    assert cost.KNOWN_PEAKS["NVIDIA H100 80GB HBM3"]["bf16"] < 1000  # 1,979 is the figure with sparsity
