"""Write a network to a folder in the Hugging Face hub's format: weights, tokenizer and a model card."""

import tempfile
from pathlib import Path
from typing import Any

from gpt2_ladder import files
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.running.checkpoints import copy_weights
from gpt2_ladder.sources import hub_format

END_OF_TEXT_ID = GPT2_VOCAB_SIZE - 1
CARD = "README.md"  # the hub shows the file of this name as the card


def trimmed(model: GPT) -> GPT:
    """Return `model` without the rows that pad its vocabulary; the logits of GPT-2's 50,257 ids stay the same."""
    shorter = GPT(model.config.model_copy(update={"vocab_size": GPT2_VOCAB_SIZE}), seed=None)
    copy_weights(shorter, dict(model.named_parameters()))
    return shorter


def check_target(folder: Path) -> None:
    """Raise UserError if `folder` is a file or is not empty, so that nothing is overwritten."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder; give the path of a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; give the path of a new folder")


def write_folder(folder: Path, model: GPT, card: str, vocab_bpe: Path, encoder_json: Path) -> None:
    """Check `folder`, and write `model`, the `card` and GPT-2's tokenizer to it, completely or not at all."""
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    generation: dict[str, Any] = {**ends, "pad_token_id": END_OF_TEXT_ID}  # transformers warns if it is missing
    if padding := list(range(GPT2_VOCAB_SIZE, model.config.vocab_size)):
        generation["suppress_tokens"] = padding  # these ids have no text
    contents = {
        hub_format.CONFIG: hub_format.describe(model) | ends | {"dtype": "float32"},
        "generation_config.json": generation,
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.n_positions},
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
        complete = Path(temporary) / "complete"
        hub_format.save_gpt(model, complete)
        for name, content in contents.items():
            files.write_json(complete / name, content)
        files.write(complete / "vocab.json", encoder_json.read_bytes())
        files.write(complete / "merges.txt", vocab_bpe.read_bytes())
        files.write(complete / CARD, card)
        complete.replace(folder)  # replaces an empty folder
