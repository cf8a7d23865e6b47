"""Convert text to token ids and back with GPT-2's byte pair encoding: tiktoken with OpenAI's two files."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2_ladder import files
from gpt2_ladder.config import GPT2_VOCAB_SIZE

END_OF_TEXT = "<|endoftext|>"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def open_encoding(vocab_bpe: Path, encoder_json: Path) -> tiktoken.Encoding:
    """Return GPT-2's byte pair encoding from OpenAI's two files; raise UserError if one is not OpenAI's."""
    for path, sha256 in ((vocab_bpe, VOCAB_BPE_SHA256), (encoder_json, ENCODER_JSON_SHA256)):
        files.check_sha256(path, sha256)
    # tiktoken caches files by their path: without the hashes it could return old ones
    ranks = data_gym_to_mergeable_bpe_ranks(str(vocab_bpe), str(encoder_json), VOCAB_BPE_SHA256, ENCODER_JSON_SHA256)
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,  # how text is split before bytes are merged
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )


def count_bytes(ids: Iterable[np.ndarray], encoder_json: Path) -> int:
    """Return the bytes of text in `ids`, arrays of any shape; raise UserError if `encoder_json` is not OpenAI's."""
    files.check_sha256(encoder_json, ENCODER_JSON_SHA256)
    encoder = json.loads(encoder_json.read_text(encoding="utf-8"))  # {token: id}, one character for each byte
    lengths = np.zeros(GPT2_VOCAB_SIZE, dtype=np.int64)
    lengths[list(encoder.values())] = [len(token) for token in encoder]
    lengths[encoder[END_OF_TEXT]] = 0  # it is no text
    return sum(int(lengths[array].sum()) for array in ids)
