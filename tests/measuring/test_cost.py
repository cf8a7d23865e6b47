"""Counted operations against numbers computed by hand and against the network's parameters."""

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
