"""Weights are copied to a user's network, and what it computes is compared with ours."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt2_ladder.checking import equal
from gpt2_ladder.checking.loading import Theirs
from gpt2_ladder.model import GPT
from helpers import own_gpts
from helpers.common import random_ids, tiny

IDS, TARGETS = random_ids(), random_ids(seed=1)
PARTS = [f"        self.{name} = nn.Linear(width, width)\n" for name in ("query", "key", "value")]
WPE = "        self.position_embedding = nn.Embedding(context, width)\n"
ATTENTION = "in layer 0 c_attn's output agrees and attention's result differs"


def compare(theirs: Theirs, **sizes: object) -> equal.Comparison | None:
    return equal.compare(theirs, equal.build_ours(theirs.network, tiny(**sizes)), IDS, TARGETS)


def assert_same(comparison: equal.Comparison, theirs: Theirs) -> None:
    """Check by hand what `comparison` says: equal logits and gradients, without a change of ours."""
    assert comparison.cause is None
    assert comparison.same_function
    assert comparison.gradient < 1e-5 < equal.GRADIENT
    ours = comparison.pairing.ours
    for model in (theirs, ours):
        model.zero_grad()
        F.cross_entropy(model(IDS)[0].flatten(0, 1), TARGETS.flatten()).backward()
    torch.testing.assert_close(theirs(IDS)[0], ours(IDS)[0], rtol=0, atol=1e-5)
    sums = [sum(float(p.grad.square().sum()) for p in model.parameters()) for model in (theirs, ours)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)  # no parameter was left out


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_head": 4, "n_embd": 32}], ids=["tiny", "deeper"])
@pytest.mark.parametrize("name", own_gpts.CLASSES)
def test_with_our_weights_every_right_network_computes_what_ours_does(name, sizes, write_gpt):
    theirs = own_gpts.build(write_gpt, name, tiny(**sizes))
    theirs(IDS, TARGETS)[1].backward()  # earlier gradients do not count
    comparison = compare(theirs, **sizes)
    assert_same(comparison, theirs)
    assert comparison.pairing.ours.config == tiny(**sizes, tie_weights=name != "mingpt")


@pytest.mark.parametrize("name", own_gpts.CLASSES)
def test_an_untied_head_and_missing_biases_get_our_weights_too(name, write_gpt):
    for variant in ("tied" if name == "mingpt" else "untied", "no_biases"):
        theirs = own_gpts.build(write_gpt, name, tiny(), own_gpts.sources(name)[f"variant: {variant}"])
        comparison = compare(theirs)
        assert comparison.pairing.ours.h[0].mlp.c_fc.bias.any() == (variant != "no_biases")
        if variant != "no_biases":  # without biases, ours has gradients that theirs lacks
            assert_same(comparison, theirs)
        assert comparison.same_function
        assert comparison.gradient < 1e-5


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
def test_separate_queries_keys_and_values_are_found_in_every_order(order, write_gpt):
    changes = {"".join(PARTS): "".join(PARTS[index] for index in order)}
    theirs = own_gpts.build(write_gpt, "paper", tiny(), own_gpts.replaced("paper", changes))
    comparison = compare(theirs)
    assert_same(comparison, theirs)
    attention = theirs.network.layers[1].attention
    q, k, v = comparison.pairing.ours.h[1].attn.c_attn.weight.split(16)
    for part, weight in ((attention.query, q), (attention.key, k), (attention.value, v)):
        assert torch.equal(part.weight, weight)


def test_a_square_matrix_of_conv1d_is_transposed(write_gpt):
    theirs = own_gpts.build(write_gpt, "hub", tiny())
    comparison = compare(theirs)
    assert torch.equal(
        theirs.network.transformer.h[0].attn.c_proj.weight, comparison.pairing.ours.h[0].attn.c_proj.weight.T
    )
    with torch.no_grad():
        theirs.network.transformer.h[0].attn.c_proj.weight.t_()
    assert equal.error(theirs(IDS)[0], comparison.pairing.ours(IDS)[0]) > equal.LOGITS  # it would be seen


@pytest.mark.parametrize(
    "changes",
    [
        {
            WPE: "",
            "        super().__init__()\n        self.token": f"        super().__init__()\n{WPE}        self.token",
        },
        {
            "nn.Embedding(context, width)": "nn.Parameter(torch.zeros(context, width))",
            "self.position_embedding(positions)": "self.position_embedding[: tokens.shape[1]]",
        },
    ],
    ids=["registered first", "a parameter of the network"],
)
@pytest.mark.parametrize("vocab_size", [97, 20])
def test_the_table_of_positions_is_not_taken_for_that_of_the_ids(changes, vocab_size, write_gpt):
    theirs = own_gpts.build(write_gpt, "paper", tiny(vocab_size=vocab_size), own_gpts.replaced("paper", changes))
    ours = equal.build_ours(theirs.network, tiny(vocab_size=vocab_size))
    assert ours.config == tiny(vocab_size=vocab_size)
    comparison = equal.compare(theirs, ours, IDS % vocab_size, TARGETS % vocab_size)
    assert comparison.same_function
    assert comparison.cause is None


def test_a_tied_head_that_is_registered_first_is_the_embedding(write_gpt):
    head = "        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)\n"
    start = "        self.config = config\n"
    source = own_gpts.replaced("video", {head: "", start: start + head})
    theirs = own_gpts.build(write_gpt, "video", tiny(), source)
    assert_same(compare(theirs), theirs)


def test_the_number_of_heads_is_the_one_asked_for_or_that_of_a_network_of_another_width(write_gpt):
    for name in ("paper", "video", "hub"):
        network = own_gpts.build(write_gpt, name, tiny(n_head=4)).network
        assert equal.build_ours(network, tiny(n_head=2)).config.n_head == 2, name
        assert equal.build_ours(network, tiny(n_head=2, n_embd=32)).config.n_head == 4, name
    assert equal.build_ours(GPT(tiny(n_head=4)).wte, tiny()) is None
    network = nn.ModuleDict(
        {"wte": nn.Embedding(97, 16), "wpe": nn.Embedding(32, 16), "h": nn.ModuleList([nn.Linear(1, 1)])}
    )
    assert equal.build_ours(network, tiny(n_head=8)).config.n_head == 8
    assert equal.build_ours(network, tiny(n_head=3, n_embd=48)) is None


def test_what_does_not_look_like_a_gpt2_is_not_compared(write_gpt):
    recurrent = nn.ModuleList([nn.Embedding(97, 16), nn.LSTM(16, 16), nn.Linear(16, 97)])
    assert equal.build_ours(recurrent, tiny()) is None
    gated = {
        "self.activation = GELU()\n": "self.activation = GELU()\n        self.gate = nn.Linear(width, 4 * width)\n",
        "self.activation(self.expand(x))": "self.activation(self.expand(x)) * self.gate(x)",
    }
    for changes in (gated, {"self.attention_norm = LayerNorm(width)": "self.attention_norm = nn.Identity()"}):
        theirs = own_gpts.build(write_gpt, "paper", tiny(), own_gpts.replaced("paper", changes))
        assert compare(theirs) is None


def test_unequal_gradients_are_found_although_the_logits_are_equal(write_gpt):
    theirs = own_gpts.build(write_gpt, "video", tiny(), own_gpts.sources("video")["block_detached"])
    comparison = compare(theirs)
    assert comparison.same_function
    assert comparison.gradient == 1  # 0 instead of the gradient
    assert comparison.gradient_of in ("wpe.weight", *(f"h.0.{name}" for name, _ in GPT(tiny()).h[0].named_parameters()))


def test_two_gradients_of_0_are_equal_and_a_missing_one_is_not(write_gpt):
    theirs = own_gpts.build(write_gpt, "video", tiny(), own_gpts.sources("video")["positions_missing"])
    comparison = compare(theirs)
    assert "does not add the position embeddings" in comparison.cause.what
    assert comparison.gradient < 1e-5


@pytest.mark.parametrize(
    ("name", "fault", "where"),
    [
        ("video", "scores_unscaled", ATTENTION),
        ("hub", "mask_missing", ATTENTION),
        ("paper", "heads_not_merged", "in layer 0 ln_1's output agrees and attention's result differs"),
        ("video", "relu", "in layer 0 c_fc's output agrees and the activation's result differs"),
        ("paper", "norm_eps", "in layer 0 the block's input agrees and ln_1's output differs"),
        ("mingpt", "norm_after", "in layer 0 the block's input differs"),
        ("video", "residual_missing", "in layer 1 the MLP's output agrees and the block's input differs"),
        ("hub", "final_norm_missing", "in the end ln_f's input agrees and ln_f's output differs"),
        ("video", "final_norm_missing", "all layers agree and the logits differ"),
        ("hub", "positions_shifted", "in layer 0 the block's input differs"),
    ],
)
def test_the_first_difference_is_at_the_planted_fault(name, fault, where, write_gpt):
    theirs = own_gpts.build(write_gpt, name, tiny(), own_gpts.sources(name)[fault])
    assert equal.first_difference(theirs, compare(theirs).pairing, IDS) == where


def test_a_fault_of_the_second_layer_only_is_found_there_and_has_no_known_cause(write_gpt):
    theirs = own_gpts.build(write_gpt, "video", tiny())
    theirs.network.transformer.h[1].mlp.gelu = nn.ReLU()
    comparison = compare(theirs)
    assert (comparison.cause, comparison.same_function) == (None, False)
    where = equal.first_difference(theirs, comparison.pairing, IDS)
    assert where == "in layer 1 c_fc's output agrees and the activation's result differs"


def test_a_layer_that_forward_calls_with_a_part_of_its_input_is_not_a_difference(write_gpt):
    source, whole = own_gpts.sources("video")["final_norm_missing"], "self.c_fc(x)"
    assert whole in source
    parts = "torch.cat([self.c_fc(x[:, :1]), self.c_fc(x[:, 1:])], 1)"
    theirs = own_gpts.build(write_gpt, "video", tiny(), source.replace(whole, parts))
    where = equal.first_difference(theirs, compare(theirs).pairing, IDS)
    assert where == "all layers agree and the logits differ"


def test_of_a_module_that_is_called_twice_the_first_call_is_captured():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Identity()

        def forward(self, idx):
            return self.shared(self.shared(torch.ones(2)) + 1)

    kept = equal.capture(network := Net(), {"shared": network.shared}, IDS)
    assert [each.tolist() for each in kept.values()] == [[1, 1], [1, 1]]


def test_hooks_are_removed_also_if_forward_fails(write_gpt):
    theirs = own_gpts.build(write_gpt, "video", tiny(), own_gpts.sources("video")["relu"])
    pairing = compare(theirs).pairing
    equal.first_difference(theirs, pairing, IDS)
    with pytest.raises(AssertionError, match="33 tokens"):
        equal.capture(theirs, pairing.modules, random_ids(time=33))
    for module in (*theirs.modules(), *pairing.ours.modules()):
        assert not module._forward_hooks


def test_modules_that_are_called_by_name_or_return_a_dictionary_are_captured_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.named, self.mapping, self.ids = nn.Linear(2, 3), nn.Identity(), nn.Identity()

        def forward(self, idx):
            self.ids(idx)
            return self.mapping({"x": self.named(input=torch.ones(2))})["x"]

    network = Net()
    kept = equal.capture(network, dict(network.named_children()), IDS)
    assert {key: each.shape.numel() for key, each in kept.items()} == {
        ("named", True): 2,
        **dict.fromkeys([("named", False), ("mapping", True), ("mapping", False)], 3),
    }


def test_another_shape_and_nan_are_infinitely_wrong():
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert equal.error(one, one) == 0
    assert equal.error(one * 1.5, one) == 0.5
    assert [equal.error(*pair) for pair in ((one, torch.ones(3)), (nan, one), (one, nan), (nan, nan))] == [
        torch.inf
    ] * 4
