"""Checkpoints in the hub's format: saved, loaded, and refused if they are damaged or unsupported."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import downloads, hub_format
from gpt2_ladder.using.verification import RELATIVE_TOLERANCE
from helpers.common import random_ids, tiny
from helpers.hub_networks import hub_tensors, transformers_gpt2


def assert_same_logits(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare up to float32 rounding; the verify stage allows the same 2e-5 of the largest logit."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=RELATIVE_TOLERANCE * expected.abs().max().item())


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with a checkpoint of a tiny network."""
    hub_format.save_gpt(GPT(tiny()), tmp_path)
    return tmp_path


@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_a_checkpoint_saved_by_transformers_gives_the_same_logits_here(tmp_path, tied, attention, activation):
    theirs = transformers_gpt2(tied, activation)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / hub_format.CONFIG).read_text())["activation_function"] == activation
    expected = theirs(random_ids()).logits
    logits, _ = hub_format.load_gpt(tmp_path, attention)(random_ids())
    assert_same_logits(logits, expected)


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A folder with a checkpoint that transformers saved in several files."""
    transformers_gpt2().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 4
    return tmp_path


def test_a_checkpoint_in_several_files_gives_the_same_logits(sharded):
    assert_same_logits(hub_format.load_gpt(sharded)(random_ids())[0], transformers_gpt2()(random_ids()).logits)
    hashes = [files.sha256(path) for path in sorted(sharded.glob("model-*.safetensors"))]
    provenance = downloads.read_provenance(*hub_format.weight_files(sharded))
    assert provenance["sha256"] == hashlib.sha256("".join(hashes).encode()).hexdigest()
    hub_format.save_gpt(GPT(tiny()), sharded)  # like transformers, prefer the single file
    assert torch.equal(hub_format.load_gpt(sharded).wte.weight, GPT(tiny()).wte.weight)


def test_a_checkpoint_without_one_of_its_files_is_refused(sharded):
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match="weights are missing, or of several checkpoints: model-00001-of-"):
        hub_format.load_gpt(sharded)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_saved_here_gives_the_same_logits_in_transformers_and_here(tmp_path, tied):
    ours = GPT(tiny(tie_weights=tied))
    hub_format.save_gpt(ours, tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_same_logits(ours(random_ids())[0], theirs(random_ids()).logits)
    assert torch.equal(hub_format.load_gpt(tmp_path, "eager")(random_ids())[0], ours(random_ids())[0])


def test_the_hubs_file_loads_with_masks_and_without_a_head():
    model = GPT(tiny())
    model.load_state_dict(hub_format.from_hub(hub_tensors(), model))
    expected = transformers_gpt2()(random_ids()).logits
    assert_same_logits(model(random_ids())[0], expected)


def test_a_head_that_repeats_wte_is_accepted():
    tensors = hub_tensors()
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    assert "lm_head.weight" in hub_format.from_hub(tensors, GPT(tiny()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("h.1.mlp.c_fc.bias"), r"lacks 1 tensor\(s\), such as h.1.mlp.c_fc.bias"),
        (lambda t: t.pop("wte.weight"), "the checkpoint lacks"),
        (lambda t: t.update(surprise=torch.zeros(1)), "has no tensor 'surprise'"),
        (lambda t: t.update({"h.2.attn.bias": torch.ones(1, 1, 32, 32)}), "has no tensor 'h.2.attn.bias'"),
        (lambda t: t.update({"h.0.attn.bias": torch.ones(16)}), "has no tensor 'h.0.attn.bias'"),
        (
            lambda t: t.update({"wpe.weight": torch.zeros(31, 16)}),
            r"wpe.weight has shape \(31, 16\), config.json needs \(32",
        ),
        (lambda t: t.update({"ln_f.bias": torch.zeros(16, dtype=torch.int32)}), "ln_f.bias is torch.int32; convert it"),
        (lambda t: t["wpe.weight"].fill_(torch.nan), "wpe.weight contains NaN or infinity; download it again"),
        (lambda t: t["h.1.mlp.c_proj.weight"][3].fill_(-torch.inf), "h.1.mlp.c_proj.weight contains NaN or infinity"),
        (lambda t: t["wte.weight"][96, 15].fill_(torch.nan), "wte.weight contains NaN"),  # before comparing lm_head
        (
            lambda t: t.update({"ln_f.bias": torch.full((16,), 1e39, dtype=torch.float64)}),
            "ln_f.bias contains NaN or inf",
        ),
        (lambda t: t.update({"\x1b[31m\n": torch.zeros(1)}), r"has no tensor '\\x1b\[31m\\n'"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(97, 16)}), "lm_head.weight differs from wte.weight"),
        (
            lambda t: t.update({"transformer.wte.weight": t["wte.weight"]}),
            "'wte.weight' occurs with and without 'transformer.'; keep one",
        ),
        *(
            (
                lambda t, prefix=prefix: t.update({f"{prefix}{name}": t.pop(name) for name in list(t)}),
                re.escape(f"remove the prefix '{prefix.removeprefix('transformer.')}' of torch.compile or DDP"),
            )
            for prefix in ("_orig_mod.", "module.", "_orig_mod.module.", "transformer._orig_mod.")
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message):
    tensors = hub_tensors()
    change(tensors)
    with pytest.raises(UserError, match=message):
        hub_format.from_hub(tensors, GPT(tiny()))


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_network_keeps_its_tying_and_does_not_need_its_file(tmp_path, tied):
    saved = GPT(tiny(tie_weights=tied))
    hub_format.save_gpt(saved, tmp_path)
    loaded = hub_format.load_gpt(tmp_path)
    with (tmp_path / hub_format.WEIGHTS).open("r+b") as file:
        file.write(bytes((tmp_path / hub_format.WEIGHTS).stat().st_size))
    assert (loaded.wte.weight is loaded.lm_head.weight) == tied
    assert all(torch.equal(weight, loaded.get_parameter(name)) for name, weight in saved.named_parameters())


def test_half_precision_weights_become_float32():
    tensors = {name: tensor.half() for name, tensor in hub_tensors().items()}
    loaded = hub_format.from_hub(tensors, GPT(tiny()))
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert torch.equal(loaded["wte.weight"].half(), tensors["wte.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; only 'gelu_new' is supported"),
        ({"n_head": None}, "n_head Input should be a valid integer"),
        ({"n_head": 3}, r"n_embd = 16: must be a multiple of n_head \(3\)"),
        ({"n_layer": "2"}, "n_layer Input should be a valid integer"),
        ({"n_layer": -1}, "n_layer Input should be greater than 0"),
        ({"n_layer": 10**9}, "n_layer Input should be less than or equal to 1000"),
        ({"n_embd": 10**9, "n_head": 1}, "n_embd 1000000000, .* need more memory than the [0-9,]+ weights"),
        ({"n_positions": 10**9}, "n_positions 1000000000, .* need more memory than the [0-9,]+ weights"),
        ({"vocab_size": 10**4000}, "vocab_size Input should be less than 9223372036854775808"),
        ({"vocab_size": 10**12}, "vocab_size 1000000000000 need more memory than the [0-9,]+ weights"),
        ({"tie_word_embeddings": "yes"}, "tie_weights Input should be a valid boolean"),
        ({"layer_norm_epsilon": [0] * 10**5}, r"layer_norm_epsilon is \[0, 0"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(saved, monkeypatch, change, message):
    described = json.loads((saved / hub_format.CONFIG).read_text()) | change
    (saved / hub_format.CONFIG).write_text(json.dumps({key: value for key, value in described.items() if value}))
    monkeypatch.setattr(hub_format, "GPT", lambda _: pytest.fail("memory was allocated for the network"))
    with pytest.raises(UserError, match=message) as caught:
        hub_format.load_gpt(saved)
    assert len(str(caught.value)) < 1000


def test_masks_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    hub_format.save_gpt(GPT(tiny(n_positions=40_000, attention="flash")), tmp_path)
    assert hub_format.load_gpt(tmp_path, "flash").config.n_positions == 40_000
    monkeypatch.setattr(hub_format, "LARGEST_MASKS", 2 * 40_000**2 - 1)
    monkeypatch.setattr(hub_format, "GPT", lambda _: pytest.fail("memory was allocated for the network"))
    with pytest.raises(UserError, match=r"n_positions 40000, .* need more memory than the [0-9,]+ weights"):
        hub_format.load_gpt(tmp_path, "eager")


class Trap:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was loaded",))


def test_a_pickle_is_refused_without_loading_it(saved):
    (saved / hub_format.WEIGHTS).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        hub_format.load_gpt(saved)
    (saved / hub_format.WEIGHTS).rename(saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"No such file or directory.*; pickled weights, which can run code"):
        hub_format.load_gpt(saved)


@pytest.mark.parametrize(
    "lie",
    [
        lambda header, size: header["ln_f.bias"].update(shape=[17]),
        lambda header, size: header["ln_f.bias"].update(shape=[2**32, 2**32]),
        lambda header, size: header["ln_f.bias"].update(shape=[-16]),
        lambda header, size: header["ln_f.bias"].update(dtype="F64"),
        lambda header, size: header["ln_f.bias"].update(dtype="OBJECT"),
        lambda header, size: header["ln_f.bias"].update(data_offsets=[size, size + 64]),
        lambda header, size: header["ln_f.bias"].update(data_offsets=[-64, 0]),
        lambda header, size: header["ln_f.bias"].update(data_offsets=header["ln_f.weight"]["data_offsets"]),  # overlap
        lambda header, size: header["ln_f.bias"].update(data_offsets=[0, 2**63]),
        lambda header, size: header.update(gap={"dtype": "U8", "shape": [1], "data_offsets": [size, size + 1]}),
        lambda header, size: header.pop("ln_f.bias"),  # its bytes belong to no tensor
        lambda header, size: header.clear(),
    ],
)
def test_a_header_that_lies_is_refused(saved, lie):
    raw = (saved / hub_format.WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    lie(header, len(body))
    lying = json.dumps(header).encode()
    (saved / hub_format.WEIGHTS).write_bytes(len(lying).to_bytes(8, "little") + lying + body)
    with pytest.raises(UserError, match="not a readable checkpoint") as caught:
        hub_format.load_gpt(saved)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**64 - 1])
def test_a_header_of_another_length_is_refused(saved, length):
    with (saved / hub_format.WEIGHTS).open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        hub_format.load_gpt(saved)
