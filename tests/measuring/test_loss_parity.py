"""Levels broken on purpose: the faults that comparing loss curves catches."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2_ladder import model, params_yaml
from gpt2_ladder.config import GPT2_VOCAB_SIZE, AdamW, UserError
from gpt2_ladder.measuring import loss_parity
from gpt2_ladder.model import GPT
from gpt2_ladder.training import data, loop, runtime
from helpers.common import REPOSITORY, tiny

CPU = torch.device("cpu")
SETTINGS = AdamW(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
TOLERANCES = params_yaml.load(REPOSITORY / "params.yaml").parity
TOLERANCE, STEPS = TOLERANCES.bf16, TOLERANCES.steps
# A text in which the next token mostly follows from the previous one: 20 % of the tokens are random.
DICE = np.random.default_rng(0)
TEXT = np.zeros(8 * 32 * STEPS + 1, dtype=np.int64)
for position in range(1, len(TEXT)):
    TEXT[position] = DICE.integers(97) if DICE.random() < 0.2 else (5 * TEXT[position - 1] + 7) % 97


def losses(precision="fp32", attention="eager", vocab_size=97, n_embd=256, batch=lambda x, y: (x, y)) -> list[float]:
    """The loss curve of a small GPT-2 at a level's switches; wide, so that attention matters from the start."""
    network = GPT(tiny(n_embd=n_embd, vocab_size=vocab_size, attention=attention))
    optimizer = loop.make_optimizer(network, 3e-4, SETTINGS)
    batches = (batch(x, y) for x, y in islice(data.Batches(TEXT, 8, 32), STEPS))
    autocast, scaler = runtime.set_precision(precision, CPU), runtime.make_scaler(precision, CPU)
    return [step.loss for step in loop.train(network, optimizer, batches, autocast, CPU, 2, scaler=scaler)]


def compare(name: str, curve: list[float], baseline: list[float], expected: float = 0.0) -> loss_parity.Parity:
    return loss_parity.compare(name, curve, baseline, TOLERANCE, STEPS, expected)


@pytest.fixture(scope="module")
def baseline() -> list[float]:
    return losses()


def broken_attention(scale: float | None, causal: bool):
    """CausalSelfAttention.forward with another scale or without its mask."""

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    return forward


def test_correct_levels_pass_with_a_margin(baseline):
    assert loss_parity.compare("tf32", losses("tf32"), baseline, 1e-9, STEPS).largest == 0  # no effect on a CPU
    assert loss_parity.compare("flash", losses(attention="flash"), baseline, TOLERANCES.fp32 / 4, STEPS).largest > 0
    assert 1e-5 < compare("bf16", losses("bf16"), baseline).largest < TOLERANCE / 2
    assert 1e-5 < compare("flash", losses("bf16", "flash"), baseline).largest < TOLERANCE / 2
    assert 1e-6 < compare("flash", losses("fp16", "flash"), baseline).largest < TOLERANCES.fp16 / 4


@pytest.mark.parametrize(
    ("scale", "causal"), [(1.0, True), (None, False)], ids=["no scale", "no mask"]
)  # the step check finds smaller faults, such as twice the scale
def test_a_wrong_attention_is_caught(baseline, monkeypatch, scale, causal):
    monkeypatch.setattr(model.CausalSelfAttention, "forward", broken_attention(scale, causal))
    with pytest.raises(UserError, match=r"parity: at step \d+ level 'flash' has a loss of .*, the baseline has"):
        compare("flash", losses("bf16", "flash"), baseline)


@pytest.mark.slow
def test_padded_rows_cost_what_is_expected_and_one_as_a_target_is_caught():
    def batch(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = y.clone()
        y[:, 0] = 50300  # one target of 32; at 124M one of 512 was caught too (docs/LOG.md)
        return x, y

    expected = loss_parity.padding_cost(50304, GPT2_VOCAB_SIZE)
    assert expected == pytest.approx(9.35e-4, rel=1e-3)
    baseline = losses(vocab_size=GPT2_VOCAB_SIZE, n_embd=64)
    padded = compare("padded", losses("bf16", "flash", 50304, 64), baseline, expected)
    assert padded.differences[0] == pytest.approx(expected, rel=0.5)
    with pytest.raises(UserError, match="level 'padded'"):
        compare("padded", losses("bf16", "flash", 50304, 64, batch), baseline, expected)


def test_a_loss_computed_in_bfloat16_is_caught(baseline, monkeypatch):
    def forward(self: GPT, idx: torch.Tensor, targets: torch.Tensor):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        with torch.autocast("cpu", enabled=False):
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # a mean with 8 bits: 10.8125

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(UserError, match="level 'bf16'"):
        compare("bf16", losses("bf16"), baseline)


def test_the_first_step_that_differs_is_named_with_both_losses():
    with pytest.raises(UserError) as caught:
        loss_parity.compare("bf16", [9.0, 8.0, 7.05, 6.9], [9.0, 8.005, 7.0, 6.0], 1e-2, 10)
    expected = "at step 2 level 'bf16' has a loss of 7.05000, the baseline has 7.00000: the difference of +0.05000"
    assert expected in str(caught.value)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails(loss):
    with pytest.raises(UserError):
        loss_parity.compare("bf16", [9.0, loss], [9.0, 8.0], 1e-2, 10)


def test_padding_may_not_cost_more_than_expected():
    expected = loss_parity.padding_cost(50304, 50257)
    right = loss_parity.compare("padded", [9.0 + expected, 8.0], [9.0, 8.0], 1e-4, 10, expected)
    assert right.largest == pytest.approx(0)
    for first in (9.0 + expected + 2e-4, 9.0 - 2e-4):
        with pytest.raises(UserError):
            loss_parity.compare("padded", [first, 8.0], [9.0, 8.0], 1e-4, 10, expected)


def test_only_the_first_steps_are_judged_and_all_are_recorded():
    parity = loss_parity.compare("bf16", [9.0, 8.25, 6.5, 1.0], [9.0, 8.0, 7.0, 6.0], 1.0, 3)
    assert parity.differences == (0.0, 0.25, -0.5, -5.0)
    assert (parity.steps, parity.largest, parity.largest_step) == (3, 0.5, 2)
