"""Verification passes for the right network and fails for a wrong one."""

import json
from pathlib import Path

import pytest
import torch

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import Pretrained, UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import downloads, hub_format, pretrained
from gpt2_ladder.training import devices
from gpt2_ladder.using import verification
from gpt2_ladder.using.verification import Comparison
from helpers.common import REPOSITORY, link_encoding, put_corpus, random_ids, tiny
from pipeline import CORPUS, RESULTS, WEIGHTS, tokenize_corpus, verify


@pytest.fixture
def folder(tmp_path):
    hub_format.save_gpt(GPT(tiny()), tmp_path)
    return tmp_path


def test_our_network_equals_transformers_network(folder):
    comparison = verification.compare(folder, random_ids(), random_ids(batch=1, time=4), new_tokens=8)
    assert comparison.passed
    assert 0 < comparison.max_abs_logit_diff < 1e-6 < comparison.max_abs_logit


@pytest.mark.parametrize("broken", ["flash", "eager"])
@pytest.mark.parametrize(
    ("damage", "tokens_equal"),
    [
        (lambda model: model.h[0].attn.c_attn.weight.mul_(1.01), True),
        (lambda model: model.wpe.weight[15].fill_(torch.nan), True),  # the last position, behind the continuation
        (lambda model: model.wpe.weight[5].mul_(-9), False),
    ],
    ids=["a weight", "NaN", "a position"],
)
def test_one_wrong_attention_implementation_fails(folder, monkeypatch, damage, tokens_equal, broken):
    load_gpt = hub_format.load_gpt

    @torch.no_grad()
    def load_broken(path, attention):
        model = load_gpt(path, attention)
        if attention == broken:
            damage(model)
        return model

    monkeypatch.setattr(hub_format, "load_gpt", load_broken)
    comparison = verification.compare(folder, random_ids(), random_ids(batch=1, time=4), new_tokens=8)
    assert comparison.greedy_tokens_equal == tokens_equal
    assert not comparison.passed


def test_the_tolerance_grows_with_the_logits_and_tokens_must_be_equal():
    assert Comparison(7e-4, 105.0, True).passed
    assert not Comparison(7e-4, 3.0, True).passed
    assert not Comparison(float("nan"), 3.0, True).passed
    assert not Comparison(0.0, 3.0, False).passed


def test_the_llmc_batch_has_a_separator_after_every_blank_line(encoding):
    text = "First Citizen:\nSpeak.\n\nAll:\nResolved.\n\n" * 40
    x, y = verification.llmc_batch(text, encoding)
    assert x.shape == y.shape == (4, 64)
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
    decoded = encoding.decode(x.flatten().tolist())
    assert decoded.startswith("<|endoftext|>First Citizen:\nSpeak.\n\n<|endoftext|>All:")


def test_another_loss_than_llmcs_is_refused(encoding):
    model = GPT(tiny(n_positions=64, vocab_size=50257))  # random weights: the loss is near 10.8
    with pytest.raises(UserError, match=r"expected 5\.27"):
        verification.llmc_loss(model, "a b c d " * 200, encoding)


@pytest.fixture
def checkout(tmp_path, monkeypatch, bpe_files):
    """A folder with all files that the stage reads; gpt2 and gpt2-medium are small, their weights not a stand-in."""
    text = (REPOSITORY / "params.yaml").read_text()
    for layers, heads, channels in ((12, 12, 768), (24, 16, 1024)):
        old = f"n_layer: {layers}\n    n_head: {heads}\n    n_embd: {channels}\n    n_positions: 1024"
        assert old in text
        text = text.replace(old, "n_layer: 1\n    n_head: 1\n    n_embd: 8\n    n_positions: 256")
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    link_encoding(bpe_files)
    put_corpus(monkeypatch, b"First Citizen:\nSpeak.\n\nAll:\nResolved.\n\n" * 400)
    tokenize_corpus.main()
    hub_format.save_gpt(GPT(params_yaml.load().size.gpt()), WEIGHTS)
    for path in (WEIGHTS / hub_format.CONFIG, WEIGHTS / hub_format.WEIGHTS):
        downloads.write_provenance(path, "the hub", files.sha256(path))
    return tmp_path


def choose(model: str) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("model: gpt2 ", f"model: {model} "))


def test_a_larger_size_is_verified_without_llmcs_loss(checkout):
    with pytest.raises(UserError, match=r"the loss on llm\.c's batch is .*; run `dvc repro -f download`"):
        verify.main()
    choose("gpt2-medium")
    verify.main()
    result = json.loads((RESULTS / "verify.json").read_text())
    assert (result["weights"], result["llmc_loss"]) == ("openai", None)
    assert result["greedy_tokens_equal"]
    assert result["random"]["greedy_tokens_equal"]
    assert sorted(path.suffix for path in WEIGHTS.iterdir()) == [*[".json"] * 3, ".safetensors"]
    first, *samples = (RESULTS / "samples.txt").read_text().splitlines()
    assert first == "OpenAI's weights were verified."
    assert len(samples) == verify.SAMPLES
    assert all(verify.PROMPT in sample for sample in samples)


def test_a_verification_that_is_run_again_compares_again(checkout, monkeypatch):
    choose("gpt2-medium")
    verify.main()
    load_gpt = hub_format.load_gpt

    @torch.no_grad()
    def load_broken(path: Path, attention: str) -> GPT:
        model = load_gpt(path, attention)
        model.h[0].attn.c_attn.weight.mul_(1.01)
        return model

    monkeypatch.setattr(hub_format, "load_gpt", load_broken)
    with pytest.raises(UserError, match="our GPT and transformers differ on the downloaded weights"):
        verify.main()


def test_a_stand_in_is_verified_and_not_sampled(checkout, capsys):
    params = params_yaml.load()
    pretrained.fetch(WEIGHTS, Pretrained(source="stand-in", folder=None), params.model, params.size, params.seed)
    verify.main()
    assert json.loads((RESULTS / "verify.json").read_text())["greedy_tokens_equal"]
    written = (RESULTS / "samples.txt").read_text()
    assert written == f"{pretrained.STAND_IN_NOTICE}\nNo samples: random weights write random words.\n"
    assert verify.PROMPT not in capsys.readouterr().out


@pytest.mark.parametrize("path", [WEIGHTS / hub_format.CONFIG, WEIGHTS / hub_format.WEIGHTS, CORPUS], ids=str)
def test_a_damaged_download_is_refused_before_anything_is_written(checkout, path):
    with path.open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=rf"^{path}: sha256 is .*; run `dvc repro -f download`$"):
        verify.main()
    assert not RESULTS.exists()


def test_too_little_memory_is_reported_before_anything_is_loaded(checkout, monkeypatch):
    choose("gpt2-xl")
    monkeypatch.setattr(devices, "free_memory", lambda _: 8 * 10**9)
    with pytest.raises(UserError, match=r"gpt2-xl against transformers needs 13\.9 GB of memory, 8\.0 GB are free"):
        verify.main()
