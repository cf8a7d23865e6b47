"""A folder for the hub: transformers loads it, and its card states what is known and no more."""

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.files import write_json
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import hub_format
from gpt2_ladder.using.verification import RELATIVE_TOLERANCE
from helpers.common import REPOSITORY, random_ids, tiny
from pipeline.tools import share

TEXT = "Hello  world,\n\n\tnaïve e\u0301 東京 🎉\u00a0don't <|endoftext|> Next<|endoftext|>  \x00\r\n 'll 123 "
PADDED, REAL = 50304, 50257


@pytest.fixture
def write(tmp_path, bpe_files):
    """A function that writes a network to a folder for the hub and returns the folder."""

    def make(model: GPT, card: str = "", name: str = "shared") -> Path:
        share.write_folder(tmp_path / name, model, card, *bpe_files)
        return tmp_path / name

    return make


@pytest.fixture
def project(tmp_path, monkeypatch, bpe_files) -> Path:
    """A folder with all that the command needs except a trained trial."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/bpe").symlink_to(bpe_files[0].parent)
    (tmp_path / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    return tmp_path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trim", [True, False])
def test_a_shared_network_has_the_same_logits_in_transformers_padded_or_trimmed(write, tied, trim):
    model, ids = GPT(tiny(vocab_size=PADDED, tie_weights=tied)), random_ids(vocab_size=REAL)
    folder = write(share.trimmed(model) if trim else model)
    expected = model(ids)[0][..., :REAL]
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), hub_format.load_gpt(folder)
    assert isinstance(theirs, GPT2LMHeadModel)
    assert theirs.config.vocab_size == ours.config.vocab_size == (REAL if trim else PADDED)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (REAL - 1, REAL - 1)
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == ours.config.tie_weights == tied
    largest = expected.abs().max().item()  # another order of float32 summation
    for logits in (theirs(ids).logits, ours(ids)[0]):
        torch.testing.assert_close(logits[..., :REAL], expected, rtol=0, atol=RELATIVE_TOLERANCE * largest)


def test_the_shared_tokenizer_gives_the_tokens_of_tiktoken(write, encoding):
    tokenizer = AutoTokenizer.from_pretrained(write(GPT(tiny(vocab_size=REAL))))
    ids = encoding.encode(TEXT, allowed_special="all")
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.decode(ids) == TEXT
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.model_max_length) == (REAL, REAL - 1, 32)


def test_transformers_pipeline_never_draws_a_padded_row(write):
    model = GPT(tiny(vocab_size=PADDED, tie_weights=False))
    with torch.no_grad():  # the last LayerNorm gives ones: padded rows have logits of 16, all others below 1
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1)
        model.lm_head.weight[REAL:] = 1
    write_text = pipeline("text-generation", str(write(model)))
    ids = write_text("The", max_new_tokens=8, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    assert len(ids) == 1 + 8
    assert max(ids) < REAL
    assert write_text("The", max_new_tokens=8)[0]["generated_text"].startswith("The")


def test_an_error_while_writing_leaves_no_folder(write, tmp_path, monkeypatch):
    def full(path: Path, content: str | bytes) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(GPT(tiny(vocab_size=REAL)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "put",
    [
        lambda target: target.touch(),
        lambda target: target.symlink_to("elsewhere"),
        lambda target: target.mkdir() or (target / "mine").touch(),
    ],
    ids=["a file", "a link", "a file in it"],
)
def test_existing_files_are_never_overwritten(project, tmp_path, put):
    hub_format.save_gpt(GPT(tiny(vocab_size=REAL)), Path("found"))
    put(tmp_path / "shared")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="shared: exists and is not an empty folder; give the path of a new folder"):
        share.main("shared", "found")
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_empty_folder_is_filled_with_the_usual_permissions(write, tmp_path):
    (tmp_path / "shared").mkdir()
    folder = write(GPT(tiny(vocab_size=REAL)), "card")
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors"),
        *("tokenizer_config.json", "vocab.json"),
    }


def test_the_card_of_an_unknown_network_states_what_is_unknown(project, capsys):
    hub_format.save_gpt(GPT(tiny(vocab_size=PADDED)), Path("found here"))
    share.main("to/my net", "found here", "--trim")
    card = ModelCard.load(Path("to/my net/README.md"))
    facts = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2"]}
    assert card.data.to_dict() == facts
    assert "The number of training steps and the training data are not known." in card.text
    assert "a local file of unknown origin" in card.text
    assert "the rows that padded its vocabulary during training were removed" in card.text
    assert "Training" not in card.text
    assert "none has been chosen for these weights" in card.text
    assert "hf upload 'OWNER/my net' 'to/my net' ." in capsys.readouterr().out


def test_a_trial_that_was_not_trained_is_refused(project):
    with pytest.raises(UserError, match=r"models/trial: contains no network \(not trained, or not pulled\)"):
        share.main("to")
    write_json(Path("results/trial/facts.json"), {"status": "skipped", "reason": "no bfloat16 here"})
    with pytest.raises(UserError, match=r"models/trial: contains no network \(no bfloat16 here\); train it"):
        share.main("to")
    assert not Path("to").exists()


def test_a_network_outside_a_dvc_repository_is_refused(project):
    hub_format.save_gpt(GPT(tiny(vocab_size=REAL)), Path("models/trial"))
    with pytest.raises(UserError, match="dvc status failed, so the run that trained the network is unknown: ERROR: "):
        share.main("to")
