"""Each check of how a network behaves passes for right networks, and fails for the fault that it is for."""

import pytest
import torch
from torch import nn

from gpt2_ladder.checking import behaviour
from gpt2_ladder.checking.behaviour import FAIL, PASS, STREAM, UNKNOWN, VARIANT, Finding
from gpt2_ladder.checking.loading import Theirs
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from helpers import own_gpts
from helpers.common import params_with, random_ids, tiny

PARAMS = params_with()
FULL, SMALL = (PARAMS.models[name].gpt() for name in ("gpt2", "tiny"))
SMALL = SMALL.with_values({"vocab_size": 300})
LOSS = "F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1)"
LOGITS = "logits = self.lm_head(x)"
END = "        x = self.transformer.ln_f(x)\n"


def findings(theirs: Theirs, seed: int = 1) -> dict[str, Finding]:
    """Return what the checks find, by their names."""
    return {each.check: each for each in behaviour.check_behaviour(theirs, GPT(SMALL, seed), seed, 5e-3)}


def changed(write_gpt, old: str, new: str) -> Theirs:
    """Build the video's network with one text replaced."""
    return own_gpts.build(write_gpt, "video", SMALL, own_gpts.replaced("video", {old: new}))


def failed(found: dict[str, Finding]) -> list[str]:
    return [name for name, each in found.items() if each.verdict == FAIL]


def counted(**changes: object) -> nn.Module:
    """Return a GPT-2 of the size of the paper's, without memory."""
    with torch.device("meta"):
        return GPT(FULL.with_values(changes), seed=None)


def without(*names: str, **changes: object) -> nn.Module:
    """Return a GPT-2 without the modules and parameters whose names end so."""
    network = counted(**changes)
    for name in [name for name, _ in (*network.named_modules(), *network.named_parameters()) if name.endswith(names)]:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, None)
    return network


def one_block(**changes: object) -> nn.Module:
    network = counted(**changes)
    network.h = nn.ModuleList([network.h[0]] * len(network.h))
    return network


def with_bias(**changes: object) -> nn.Module:
    network = counted(**changes)
    network.lm_head.bias = nn.Parameter(torch.empty(network.lm_head.out_features, device="meta"))
    return network


LINEAR = ("c_attn.bias", "c_proj.bias", "c_fc.bias")
NORMS = ("ln_1.bias", "ln_2.bias", "ln_f.bias")


@pytest.mark.parametrize(
    ("network", "verdict", "reason"),
    [
        (counted(), PASS, ""),
        (counted(vocab_size=50304), VARIANT, "the vocabulary is padded to 50,304"),
        (counted(tie_weights=False), VARIANT, "the head is not tied to the embedding"),
        (without(*LINEAR), VARIANT, "linear layers have no biases"),
        (without(*NORMS), VARIANT, "LayerNorms have no biases"),
        (with_bias(), VARIANT, "the head has a bias"),
        (without("c_attn.bias"), FAIL, "c_attn has no bias"),
        (without("ln_f"), FAIL, "the final LayerNorm is missing"),
        (without("wpe"), FAIL, "the position embeddings are missing"),
        (one_block(), FAIL, "all blocks are the same one"),
        (
            without(*LINEAR, *NORMS, vocab_size=50304, tie_weights=False),
            VARIANT,
            "the vocabulary is padded to 50,304, the head is not tied to the embedding, "
            "linear layers have no biases, LayerNorms have no biases",
        ),
        (without("c_attn.bias", tie_weights=False), FAIL, "c_attn has no bias"),
        (without("c_fc.weight"), FAIL, "-28,311,552 parameters are not explained"),
        (nn.ModuleList([counted(), nn.Linear(1, 1)]), FAIL, "+2 parameters are not explained"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_difference_in_the_number_of_parameters_is_explained(network, verdict, reason):
    found = behaviour.check_parameters(network, FULL)
    assert (found.verdict, found.reason) == (verdict, reason)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert found.result == f"{count:,}; GPT-2 has 124,439,808"


@pytest.mark.parametrize("vocab_size", [65, 192, 256, 300, 1024, 2304])  # 768 / 4, 768 / 3
def test_the_head_of_a_small_vocabulary_is_explained(vocab_size):
    config = FULL.with_values({"vocab_size": vocab_size})
    network = counted(vocab_size=vocab_size, tie_weights=False)
    assert behaviour.check_parameters(network, config).reason == "the head is not tied to the embedding"


@pytest.mark.parametrize("name", own_gpts.CLASSES)
def test_right_networks_pass_every_check_and_each_has_its_reason_on_the_page(name, write_gpt):
    found = findings(own_gpts.build(write_gpt, name, SMALL))
    verdicts = {check: each.verdict for check, each in found.items() if each.verdict != PASS}
    known = {"mingpt": {"dropout": VARIANT}, "hub": {"dropout": VARIANT, "host reads": VARIANT}}  # it reads its mask
    assert verdicts == known.get(name, {})
    assert found.keys() | {"parameters", "function", "loss curve"} == behaviour.CHECKS.keys()


def test_dropout_is_a_variant_in_train_mode_and_set_to_0_in_all_other_checks(write_gpt):
    theirs = own_gpts.build(write_gpt, "mingpt", SMALL)
    assert findings(theirs)["dropout"].result == "on in train mode; 0 in all other checks"
    rates = [module.p for module in theirs.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.0] * len(rates)
    assert len(rates) == 1 + 3 * SMALL.n_layer
    theirs.train()
    assert torch.equal(theirs(random_ids())[0], theirs(random_ids())[0])


def test_rates_of_dropout_that_modules_keep_as_numbers_are_set_to_0():
    module = nn.MultiheadAttention(4, 2, dropout=0.1)
    module.attn_pdrop, module.drop, module.p, module.dropout_scale, module.keep = 0.1, nn.Dropout(0.3), 0.5, 3, 0.25
    behaviour.set_dropout_to_zero(module)
    assert (module.dropout, module.attn_pdrop, module.drop.p) == (0.0, 0.0, 0.0)
    assert (module.p, module.dropout_scale, module.keep) == (0.5, 3, 0.25)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (f"{LOSS})", f'{LOSS}, reduction="sum")', "it is the sum, not the mean"),
        (f"{LOSS})", f"{LOSS}, ignore_index=0)", "targets with id 0 are ignored"),
        (f"{LOSS})", f"{LOSS}, ignore_index=299)", "targets with id 299 are ignored"),
        (f"{LOSS})", f"{LOSS}, label_smoothing=0.1)", "the difference is not explained"),
        (
            f"{LOSS})",
            "F.cross_entropy(logits[:, :-1].mT, targets[:, 1:])",
            "the targets are shifted by one more token",
        ),
    ],
)
def test_a_loss_that_is_no_mean_over_all_targets_is_found(old, new, reason, write_gpt):
    theirs = changed(write_gpt, old, new)
    found = findings(theirs)
    assert (failed(found), found["loss"].reason) == (["loss"], reason)
    assert not theirs.own_loss


@pytest.mark.parametrize(
    ("loss", "verdict", "reason"),
    [
        ("F.cross_entropy(logits[:, :-1].mT, labels[:, 1:])", PASS, ""),
        ("F.cross_entropy(logits[:, :-2].mT, labels[:, 2:])", FAIL, "the targets are shifted by one more token"),
        ("None", UNKNOWN, ""),
    ],
)
def test_labels_are_shifted_once_inside(loss, verdict, reason, write_gpt):
    source = own_gpts.replaced("video", {f"{LOSS})": loss}).replace("targets", "labels")
    theirs = own_gpts.build(write_gpt, "video", SMALL, source)
    found = findings(theirs)
    assert (found["loss"].verdict, found["loss"].reason) == (verdict, reason)
    assert not theirs.own_loss
    assert (theirs.target_name is None) == (verdict == PASS)  # so that the race times only one loss
    shown = {
        "None": "forward returns none",
        "F.cross_entropy(logits[:, :-1].mT, labels[:, 1:])": "shifts the labels once",
    }
    assert shown.get(loss, "") in found["loss"].result


def test_labels_that_are_not_shifted_must_be_the_next_tokens(write_gpt):
    source = own_gpts.replaced("video", {f"{LOSS})": "F.cross_entropy(logits.mT, labels)"}).replace("targets", "labels")
    theirs = own_gpts.build(write_gpt, "video", SMALL, source)
    assert findings(theirs)["loss"].verdict == VARIANT
    assert theirs.own_loss


def test_the_networks_own_loss_is_used_where_it_is_the_cross_entropy(write_gpt):
    theirs = own_gpts.build(write_gpt, "video", SMALL)
    assert not failed(findings(theirs))
    assert theirs.own_loss


@pytest.mark.parametrize(
    ("old", "new", "checks"),
    [
        (END, "        x = x + 0 * x.sum().item()\n" + END, []),
        (LOGITS, "logits = self.lm_head(x) / 100", ["overfit"]),
        (LOGITS, "logits = self.lm_head(x) + 1000 - 1000", ["bfloat16"]),
        (LOGITS, "logits = self.lm_head(x) + len(idx) * torch.arange(300) / 1000", ["accumulation"]),
        (LOGITS, "logits = self.lm_head(x) + 5 * torch.arange(300) / 100", ["loss at init"]),
        (END, END + "        x = x + x.mean(0)\n", ["rows", "accumulation"]),
        (END, END + "        x = x + x.roll(-1, 1)\n", ["causality"]),
        (END, END + "        x = x + torch.rand_like(x)\n", ["dropout", "accumulation", "bfloat16"]),
        ("pos_emb = self.transformer.wpe(pos)", "pos_emb = self.transformer.wpe(pos).detach()", ["gradients"]),
        ("std *= (2 * self.config.n_layer) ** -0.5", "std *= 1", [STREAM]),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_a_fault_fails_the_check_that_is_for_it(old, new, checks, write_gpt):
    found = findings(changed(write_gpt, old, new))
    assert failed(found) == checks
    assert found["host reads"].verdict == (PASS if checks else VARIANT)
    assert found["host reads"].result == f"{0 if checks else 1} in a forward pass"


def test_parameters_without_a_gradient_are_counted_and_one_is_named(write_gpt):
    theirs = changed(write_gpt, "self.transformer.wpe(pos)", "self.transformer.wpe(pos).detach()")
    assert findings(theirs)["gradients"].result == "none for 1 of 28 parameters, such as transformer.wpe.weight"


def test_without_a_list_of_blocks_the_residual_stream_is_unknown():
    network = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 300, bias=False))
    nn.init.normal_(network[0].weight, std=0.02)
    found = findings(Theirs(network))
    assert found[STREAM].verdict == UNKNOWN
    assert found["loss"].result.startswith("forward takes no targets")


@pytest.mark.parametrize("value", ["torch.nan", "torch.inf"])
def test_logits_that_are_not_finite_end_the_checks_in_one_line(value, write_gpt):
    with pytest.raises(UserError, match="forward returns NaN or infinity: is a softmax over the wrong dimension"):
        findings(changed(write_gpt, LOGITS, f"logits = self.lm_head(x) + {value}"))


def test_a_network_that_needs_targets_or_returns_one_position_without_them_is_checked(write_gpt):
    for old, new in (
        ("targets=None", "targets"),
        (LOGITS, "logits = self.lm_head(x if targets is not None else x[:, -1:])"),
    ):
        assert not failed(findings(changed(write_gpt, old, new)))


def test_the_network_of_a_short_context_is_checked_with_shorter_rows(write_gpt):
    config = tiny(n_embd=64, n_positions=8, vocab_size=300)
    theirs = own_gpts.build(write_gpt, "video", config)
    found = [*behaviour.check_behaviour(theirs, GPT(config), 1, 5e-3)]
    assert [each.check for each in found if each.verdict != PASS] == []
