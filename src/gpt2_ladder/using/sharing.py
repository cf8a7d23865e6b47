"""A network -> a folder as the Hugging Face hub has them: weights, tokenizer, and a card of what is known of it."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt2_ladder import files
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.reporting.facts import templates
from gpt2_ladder.sources import hub_format

END_OF_TEXT_ID = GPT2_VOCAB_SIZE - 1
CARD = "README.md"  # by which name the hub shows it


def trimmed(model: GPT) -> GPT:
    """Return `model` without the rows that pad its vocabulary; the logits of GPT-2's 50,257 ids stay the same."""
    with torch.device("meta"):
        shorter = GPT(model.config.model_copy(update={"vocab_size": GPT2_VOCAB_SIZE}), seed=None)
    state = model.state_dict()
    state |= {name: state[name][:GPT2_VOCAB_SIZE] for name in ("wte.weight", "lm_head.weight")}  # (V, C) each
    shorter.load_state_dict(state, assign=True)
    if model.config.tie_weights:
        shorter.wte.weight = shorter.lm_head.weight
    return shorter


def card(facts: Mapping[str, Any]) -> str:
    """Return the model card: a header that the hub reads, then `facts` in words and nothing else."""
    return templates.get_template("card.md").render(**facts) + "\n"


def check_target(folder: Path) -> None:
    """Raise UserError where something is at `folder` already: nothing is ever overwritten."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder; name one that is not there yet")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty, and nothing is overwritten; name a folder that is not there yet")


def write_folder(folder: Path, model: GPT, card: str, encoder_json: Path, vocab_bpe: Path) -> None:
    """Write `model`, GPT-2's tokenizer from OpenAI's two files, and the `card` to `folder`: all of it, or nothing.

    Raises:
        UserError: there is something at `folder`.
    """
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    # without a token to pad with transformers warns; the rows that pad the vocabulary stand for no text
    generation: dict[str, Any] = {**ends, "pad_token_id": END_OF_TEXT_ID}
    if padding := list(range(GPT2_VOCAB_SIZE, model.config.vocab_size)):
        generation["suppress_tokens"] = padding
    tokens = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.n_positions}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
        whole = Path(temporary) / "whole"
        hub_format.save_gpt(model, whole)
        described = files.read_json(whole / hub_format.CONFIG) | ends | {"dtype": "float32"}
        for name, content in (
            (hub_format.CONFIG, described),
            ("generation_config.json", generation),
            ("tokenizer_config.json", tokens),
        ):
            files.write(whole / name, json.dumps(content, indent=2) + "\n")
        files.write(whole / "vocab.json", encoder_json.read_bytes())
        files.write(whole / "merges.txt", vocab_bpe.read_bytes())
        files.write(whole / CARD, card)
        whole.replace(folder)  # an empty folder gives way
