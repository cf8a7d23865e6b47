"""Checkpoints: through the hub's format and back, and whatever does not fit is refused."""

import json
import pickle

import pytest
import torch
from conftest import random_ids, tiny
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_ladder import hub
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.verification import RELATIVE_TOLERANCE


def transformers_gpt2(tied: bool = True) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 97}
    # weights ten times their usual size: attention far from uniform, GELU far from linear, so that a wrong one shows
    config = GPT2Config(**sizes, bos_token_id=96, eos_token_id=96, tie_word_embeddings=tied, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def assert_same_logits(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Two orders of summation round differently in float32; the verify stage allows the same 2e-5 of the largest."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=RELATIVE_TOLERANCE * expected.abs().max().item())


def hub_tensors() -> dict[str, torch.Tensor]:
    """Tensors as the hub's own file has them: no prefix, no head, a mask for every layer."""
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in transformers_gpt2().state_dict().items()}
    del tensors["lm_head.weight"]
    return tensors | {f"h.{layer}.attn.bias": torch.ones(32, 32).tril().view(1, 1, 32, 32) for layer in range(2)}


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_saved_by_transformers_gives_the_same_logits_here(tmp_path, tied, attention):
    theirs = transformers_gpt2(tied)
    theirs.save_pretrained(tmp_path)
    expected = theirs(random_ids()).logits
    logits, _ = hub.load_gpt(tmp_path, attention)(random_ids())
    assert_same_logits(logits, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_saved_here_gives_the_same_logits_in_transformers_and_here(tmp_path, tied):
    ours = GPT(tiny(tie_weights=tied))
    hub.save_gpt(ours, tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_same_logits(ours(random_ids())[0], theirs(random_ids()).logits)
    assert torch.equal(hub.load_gpt(tmp_path)(random_ids())[0], ours(random_ids())[0])


def test_the_hubs_own_file_loads_with_its_masks_and_without_a_head():
    model = GPT(tiny())
    model.load_state_dict(hub.from_hub(hub_tensors(), model))
    expected = transformers_gpt2()(random_ids()).logits
    assert_same_logits(model(random_ids())[0], expected)


def test_a_head_that_repeats_wte_is_accepted():
    tensors = hub_tensors()
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    assert "lm_head.weight" in hub.from_hub(tensors, GPT(tiny()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("h.1.mlp.c_fc.bias"), "tensor h.1.mlp.c_fc.bias is missing"),
        (lambda t: t.pop("wte.weight"), "is missing"),
        (lambda t: t.update(surprise=torch.zeros(1)), "tensor surprise is not part of"),
        (lambda t: t.update({"h.2.attn.bias": torch.ones(1, 1, 32, 32)}), r"tensor h.2.attn.bias is not part of"),
        (lambda t: t.update({"h.0.attn.bias": torch.ones(16)}), r"tensor h.0.attn.bias is not part of"),
        (lambda t: t.update({"wpe.weight": torch.zeros(31, 16)}), r"wpe.weight has shape \(31, 16\), not \(32, 16\)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(97, 16)}), "lm_head.weight differs from wte.weight"),
        (lambda t: t.update({"transformer.wte.weight": t["wte.weight"]}), "wte.weight is there twice"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message):
    tensors = hub_tensors()
    change(tensors)
    with pytest.raises(UserError, match=message):
        hub.from_hub(tensors, GPT(tiny()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu', this GPT-2 knows only 'gelu_new'"),
        ({"n_head": None}, "'n_head' is missing"),
        ({"n_head": 3}, r"n_embd = 16: must be a multiple of n_head \(3\)"),
        ({"n_layer": "2"}, "n_layer Input should be a valid integer"),
    ],
)
def test_a_config_that_asks_for_another_network_is_refused(tmp_path, change, message):
    hub.save_gpt(GPT(tiny()), tmp_path)
    described = json.loads((tmp_path / hub.CONFIG).read_text()) | change
    (tmp_path / hub.CONFIG).write_text(json.dumps({key: value for key, value in described.items() if value}))
    with pytest.raises(UserError, match=message):
        hub.load_gpt(tmp_path)


class Trap:
    """A pickle of this runs code when it is read."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was read",))


def test_a_pickle_is_refused_unread(tmp_path):
    hub.save_gpt(GPT(tiny()), tmp_path)
    (tmp_path / hub.WEIGHTS).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        hub.load_gpt(tmp_path)
    (tmp_path / hub.WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: pickled weights can run code"):
        hub.load_gpt(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path):
    hub.save_gpt(GPT(tiny()), tmp_path)
    raw = (tmp_path / hub.WEIGHTS).read_bytes()
    (tmp_path / hub.WEIGHTS).write_bytes(raw[:-100])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        hub.load_gpt(tmp_path)


def test_saving_keeps_the_hubs_names_and_layout(tmp_path):
    hub.save_gpt(GPT(tiny()), tmp_path)
    saved = load_file(tmp_path / hub.WEIGHTS)
    expected = {name: t for name, t in hub_tensors().items() if not name.endswith(".attn.bias")}
    assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in expected.items()}
    save_file(saved, tmp_path / "again.safetensors")  # contiguous, unshared: safetensors takes them as they are
