"""Each known cause changes the logits as its sentence says, and no two give the same."""

from itertools import combinations

import pytest
import torch
from torch import nn

from gpt2_ladder.checking import equal
from gpt2_ladder.checking.causes import CAUSES, changed
from gpt2_ladder.model import GPT
from helpers.common import random_ids, tiny

HOW = {cause.what: cause.how for cause in CAUSES}


def sharp(**sizes: object) -> GPT:
    model = GPT(tiny(**sizes), seed=None)
    equal.sharpen(model)
    return model


@torch.no_grad()
def all_logits(model: GPT) -> dict[str, torch.Tensor]:
    return {what: changed(model, random_ids(), **how) for what, how in HOW.items()}


def how(words: str) -> dict:
    """Return the change of the only cause whose sentence has these words."""
    (found,) = [change for what, change in HOW.items() if words in what]
    return found


def test_without_a_change_the_logits_are_those_of_our_network():
    model = sharp()
    assert equal.error(changed(model, random_ids()), model(random_ids())[0]) < 1e-6


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_head": 4, "n_embd": 64}], ids=["tiny", "deeper"])
def test_every_cause_changes_the_logits_and_no_two_give_the_same(sizes):
    model = sharp(**sizes)
    found = {"right": model(random_ids())[0], **all_logits(model)}
    assert all(logits.isfinite().all() for logits in found.values())
    pairs = {(a, b): equal.error(found[a], found[b]) for a, b in combinations(found, 2)}
    assert {pair: error for pair, error in pairs.items() if error <= 1.5 * equal.LOGITS} == {}


def test_one_head_hides_only_the_causes_of_its_order_and_width():
    model = sharp(n_head=1)
    right = model(random_ids())[0]
    same = {what for what, logits in all_logits(model).items() if equal.error(logits, right) <= equal.LOGITS}
    assert same == {what for what in HOW if "Your heads" in what or "by the width" in what}


@pytest.mark.parametrize(
    ("words", "name", "factor"),
    [
        ("is not scaled", "c_attn", 8**0.5),
        ("by the width", "c_attn", 0.5**0.5),
        ("scaled by 1/D", "c_attn", 8**-0.5),
        ("scaled by sqrt(D)", "c_attn", 8.0),
        ("does not add the position embeddings", "wpe", 0.0),
        ("embeddings are multiplied", "wte", 4.0),
        ("logits are divided", "lm_head", 0.25),
    ],
)
@torch.no_grad()
def test_a_scale_equals_scaled_weights(words, name, factor):
    model = sharp(tie_weights=False)  # D = 8, C = 16
    logits = changed(model, random_ids(), **how(words))
    for key, parameter in model.named_parameters():
        if f"{name}." in key:
            parameter[: 16 if name == "c_attn" else None] *= factor  # the queries
    assert equal.error(model(random_ids())[0], logits) < 1e-6


@pytest.mark.parametrize("cause", [cause for cause in CAUSES if "order" in cause.how], ids=lambda cause: cause.what)
@torch.no_grad()
def test_an_order_of_qkv_is_that_of_the_rows_of_c_attn(cause):
    order = cause.what.split("the order ")[1][:3]
    model = sharp()
    logits = changed(model, random_ids(), **cause.how)
    for block in model.h:
        for parameter in block.attn.c_attn.parameters():
            rows = dict(zip(order, parameter.split(16), strict=True))  # as the cause says that they are
            parameter.copy_(torch.cat([rows[name] for name in "qkv"]))
    assert equal.error(model(random_ids())[0], logits) < 1e-6


@torch.no_grad()
def test_a_bias_that_is_not_added_is_a_bias_of_0_and_shifted_positions_are_a_shifted_table():
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        model = sharp()
        logits = changed(model, random_ids(), **how(f"{name} does not add"))
        for block in model.h:
            block.get_submodule(name).bias.zero_()
        assert equal.error(model(random_ids())[0], logits) < 1e-6, name
    model = sharp()
    logits = changed(model, random_ids(), **how("positions are off by one"))
    model.wpe.weight.copy_(model.wpe.weight.roll(-1, 0))
    assert equal.error(model(random_ids())[0], logits) < 1e-6


class Norm(nn.Module):
    def __init__(self, norm: nn.LayerNorm, formula):
        super().__init__()
        self.weight, self.bias, self.formula = norm.weight, norm.bias, formula

    def forward(self, x):
        return self.formula(x) * self.weight + self.bias


@pytest.mark.parametrize(
    ("words", "formula"),
    [
        ("eps is 1e-12 to 1e-08", lambda x: nn.functional.layer_norm(x, (16,), eps=1e-8)),
        ("eps is 1e-06", lambda x: nn.functional.layer_norm(x, (16,), eps=1e-6)),
        ("eps is 0.001", lambda x: nn.functional.layer_norm(x, (16,), eps=1e-3)),
        ("does not subtract the mean", lambda x: nn.functional.rms_norm(x, (16,), eps=1e-5)),
        ("deviation of a sample", lambda x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5)),
        ("variance of a sample", lambda x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()),
    ],
)
@torch.no_grad()
def test_a_cause_of_layer_norm_is_its_formula(words, formula):
    model = sharp()
    logits = changed(model, random_ids(), **how(words))
    for parent, name in [(model, "ln_f"), *((block, name) for block in model.h for name in ("ln_1", "ln_2"))]:
        setattr(parent, name, Norm(getattr(parent, name), formula))
    assert equal.error(model(random_ids())[0], logits) < equal.LOGITS / 4


@torch.no_grad()
def test_causes_of_the_mask_and_the_residual_stream_let_through_what_they_say():
    model = sharp()
    ids, later = random_ids(), random_ids()
    later[:, 8] = (ids[:, 8] + 1) % 97

    def reached(words: str) -> list[int]:
        moved = (changed(model, later, **how(words)) - changed(model, ids, **how(words))).abs().amax((0, 2)) > 1e-7
        return [time for time, each in enumerate(moved.tolist()) if each]

    assert reached("has no causal mask") == reached("scores to 0 instead") == [*range(16)]
    assert reached("every token sees the next one") == [*range(6, 16)]  # one more token in each of the two layers
    assert reached("does not see itself") == reached("attention is not scaled") == [*range(8, 16)]
    assert reached("attention has no residual") == [*range(8, 16)]
