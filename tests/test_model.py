"""The network against arithmetic by hand and PyTorch's own modules."""

import math
from contextlib import nullcontext

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2_ladder import params_yaml
from gpt2_ladder.model import GPT, KERNELS
from helpers.common import REPOSITORY, random_ids, tiny


@pytest.mark.parametrize(
    ("name", "tie_weights", "parameters"),
    [
        ("gpt2", True, 124_439_808),
        ("gpt2", False, 163_037_184),
        ("gpt2-medium", True, 354_823_168),
        ("gpt2-large", True, 774_030_080),
        ("gpt2-xl", True, 1_557_611_200),
    ],
)
def test_every_size_has_as_many_parameters_as_the_published_network(name, tie_weights, parameters):
    size = params_yaml.load(REPOSITORY / "params.yaml").models[name].gpt()
    with torch.device("meta"):
        model = GPT(size.model_copy(update={"tie_weights": tie_weights}), seed=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_future_tokens_do_not_change_past_logits(attention):
    model, ids = GPT(tiny(attention=attention)), random_ids()
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 97
    assert torch.equal(model(ids)[0][:, :10], model(changed)[0][:, :10])
    assert not torch.allclose(model(ids)[0][:, 10:], model(changed)[0][:, 10:])


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, ids, targets = GPT(tiny()), random_ids(seed=1), random_ids(seed=2)
    logits, loss = model(ids, targets)
    by_hand = [-logits[b, t].softmax(-1)[targets[b, t]].log() for b in range(2) for t in range(16)]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    assert model(ids)[1] is None


def test_the_loss_starts_near_a_uniform_guess():
    model = GPT(tiny(vocab_size=50257))
    assert abs(model(random_ids(), random_ids(seed=1))[1].item() - math.log(50257)) < 0.05


def test_pytorch_init_has_the_distributions_of_pytorchs_modules():
    model = GPT(tiny(n_embd=64, init="pytorch", tie_weights=False))
    for weight, expected in (
        (model.h[0].mlp.c_proj.weight, nn.Linear(256, 64).weight),
        (model.h[0].attn.c_attn.bias, nn.Linear(64, 192).bias),
        (model.lm_head.weight, nn.Linear(64, 97).weight),
        (model.wte.weight, nn.Embedding(97, 64).weight),
    ):
        # hundreds to thousands of draws: the standard deviation has an error of a few percent
        torch.testing.assert_close(weight.std(), expected.std(), rtol=0.15, atol=0)
    assert model.h[0].mlp.c_proj.weight.abs().max() <= 1 / math.sqrt(256)


def test_a_tied_matrix_keeps_the_init_of_the_linear_layer():
    model = GPT(tiny(init="pytorch", tie_weights=True))
    assert model.wte.weight.abs().max() <= 1 / math.sqrt(16)  # as an nn.Embedding it would be N(0, 1)


def test_gpt2_init_is_0_02_with_residual_projections_scaled_down():
    model = GPT(tiny(n_layer=8, n_embd=64, vocab_size=997))
    for weight in (model.wte.weight, model.wpe.weight, model.h[3].attn.c_attn.weight, model.h[3].mlp.c_fc.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (model.h[3].attn.c_proj.weight, model.h[3].mlp.c_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05)
    assert not model.h[3].mlp.c_fc.bias.any()


@pytest.mark.parametrize(
    ("change", "std"), [({}, 0.02), ({"init": "pytorch", "tie_weights": False}, 1)], ids=["gpt2", "pytorch"]
)
def test_padded_rows_are_drawn_like_the_others_and_change_no_other_weight(change, std):
    plain, padded = (GPT(tiny(vocab_size=vocab_size, **change)) for vocab_size in (50257, 50304))
    state = padded.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, state[name][: len(weight)]), name
    assert padded.wte.weight[50257:].std().item() == pytest.approx(std, rel=0.1)  # 752 draws: an error of 2.6 %


def test_padded_rows_change_the_loss_by_less_than_1e_3():
    plain, padded = GPT(tiny(vocab_size=50257)), GPT(tiny(vocab_size=50304))
    ids, targets = random_ids(vocab_size=50257), random_ids(vocab_size=50257, seed=1)
    change = (padded(ids, targets)[1] - plain(ids, targets)[1]).item()
    # 47 more outcomes, as likely as the others: ln(50304 / 50257) = 9.35e-4
    assert change == pytest.approx(math.log(50304 / 50257), abs=5e-5)


def test_no_weight_is_drawn_twice():
    before = torch.get_rng_state()
    GPT(tiny(init="pytorch"))  # PyTorch's default init would use the global generator
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_determines_the_weights():
    torch.manual_seed(0)
    first = GPT(tiny(), seed=1).state_dict()
    torch.manual_seed(1)
    assert all(torch.equal(weight, first[name]) for name, weight in GPT(tiny(), seed=1).state_dict().items())
    assert not torch.equal(GPT(tiny(), seed=2).wte.weight, first["wte.weight"])


class Shapes(TorchDispatchMode):
    """Record the shapes of all computed tensors."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


def test_a_chunked_loss_has_the_same_gradients_and_never_all_logits_at_once():
    ids, targets = random_ids(3, 17), random_ids(3, 17, seed=1)  # 51 tokens: the last of four chunks is shorter
    plain, chunked = GPT(tiny()), GPT(tiny(chunked_loss=True))
    plain(ids, targets)[1].backward()
    with Shapes() as shapes:
        logits, loss = chunked(ids, targets)
        loss.backward()
    assert logits is None
    assert loss.item() == pytest.approx(plain(ids, targets)[1].item(), abs=1e-6)
    for name, parameter in plain.named_parameters():
        # another order of summation changes the last bits of gradients of at most about 1
        assert torch.allclose(parameter.grad, chunked.get_parameter(name).grad, atol=1e-6), name
    rows = {shape[0] for shape in shapes.seen if len(shape) == 2 and shape[1] == 97 and shape[0] != 16}
    assert max(rows) == 13  # ceil(51 / 4)
    assert torch.equal(chunked(ids)[0], plain(ids)[0])  # without targets it returns all logits


def test_a_chunked_loss_compiles_to_one_graph():
    model, graphs = GPT(tiny(chunked_loss=True)), []
    model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=False, fullgraph=True)
    model(random_ids(), random_ids(seed=1))[1].backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_computes_blocks_twice_with_the_same_gradients(compiled):
    ids, targets = random_ids(), random_ids(seed=1)
    plain, checkpointed = GPT(tiny()), GPT(tiny(activation_checkpointing=True))
    calls = []
    if compiled:
        checkpointed.compile(backend="aot_eager", dynamic=False, fullgraph=True)  # one graph, or an error
    else:
        checkpointed.h[0].register_forward_pre_hook(lambda *_: calls.append("forward"))
    losses = [model(ids, targets)[1] for model in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for name, parameter in plain.named_parameters():
        # the same operations; when compiled, gradients are summed in another order
        atol = 1e-6 if compiled else 0
        torch.testing.assert_close(checkpointed.get_parameter(name).grad, parameter.grad, rtol=0, atol=atol)
    assert len(calls) == (0 if compiled else 2)  # a hook would break the compiled graph


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("kernel", "operator"), [("FLASH_ATTENTION", "flash_attention"), ("MATH", "softmax")])
def test_a_named_attention_kernel_is_pinned_also_in_a_compiled_graph(monkeypatch, compiled, kernel, operator):
    """A CPU has two kernels, which stand for a GPU's."""

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), options=None):
            seen.append(str(function))
            return function(*args, **(options or {}))

    def record(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    seen: list[str] = []
    monkeypatch.setitem(KERNELS, "cudnn", SDPBackend.__members__[kernel])
    network = GPT(tiny(attention="cudnn"))
    if compiled:
        network.compile(fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    with nullcontext() if compiled else Operators():
        network(random_ids(), random_ids(seed=1))[1].backward()
    found = {
        name for name in ("flash_attention", "softmax") if any(name in each and "log" not in each for each in seen)
    }
    assert found == {operator}
    torch._dynamo.reset()
