"""Text <-> token shards, and shards -> batches.

A shard is nanoGPT's: raw little-endian uint16 token ids without a header, so shards can be shared with it. A sidecar
`<shard>.json` holds what the shard must be; a shard from elsewhere may come without one.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from gpt2_ladder import files
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError

DTYPE = np.dtype("<u2")  # two bytes hold every id below 65,536
END_OF_TEXT = "<|endoftext|>"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


def open_encoding(vocab_bpe: Path, encoder_json: Path) -> tiktoken.Encoding:
    """Return GPT-2's byte pair encoding from OpenAI's two files, without asking the network.

    Raises:
        UserError: a file is another than OpenAI's, which would give other ids.
    """
    for path, sha256 in ((vocab_bpe, VOCAB_BPE_SHA256), (encoder_json, ENCODER_JSON_SHA256)):
        if (actual := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
            raise UserError(f"{path}: sha256 is {actual}, GPT-2's is {sha256}; run `dvc repro -f download`")
    # The hashes are passed because tiktoken caches files by their path: without them it could return old ones.
    ranks = data_gym_to_mergeable_bpe_ranks(str(vocab_bpe), str(encoder_json), VOCAB_BPE_SHA256, ENCODER_JSON_SHA256)
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,  # how text is cut before bytes are merged
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )


def read_text(path: Path) -> str:
    """Return the corpus at `path`, every byte of it: line ends, NULs and a byte order mark are text like any other.

    Raises:
        UserError: it is not UTF-8.
    """
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte {raw[error.start]:#04x} at offset {error.start} is not UTF-8 ({error.reason}); "
            f"convert it, from Latin-1 say: iconv -f LATIN1 -t UTF-8 {path} > converted.txt"
        ) from None


def split_text(text: str, train_fraction: float = 0.9) -> tuple[str, str]:
    """Cut `text` in two, for training and validation, after `train_fraction` of its characters.

    Raises:
        UserError: there is no text, or a single character of it.
    """
    cut = int(len(text) * train_fraction)
    if cut == 0 or not text.strip():
        raise UserError("the corpus is empty; run `dvc repro -f download`")
    return text[:cut], text[cut:]


def write_shard(path: Path, ids: list[int]) -> None:
    """Write token `ids` as a shard, and its sidecar beside it."""
    shard = np.array(ids, dtype=DTYPE)
    # the sidecar takes its place first: interrupted between the two, no shard or another one is beside it
    with files.replacing(sidecar_path(path), path) as (sidecar, raw):
        raw.write_bytes(shard.tobytes())
        sidecar.write_text(json.dumps(_describe(shard), indent=2) + "\n")


def sidecar_path(shard: Path) -> Path:
    """Return where the sidecar of `shard` lies: data/train.bin -> data/train.json."""
    return shard.with_suffix(".json")


def open_shard(path: Path) -> np.memmap:
    """Map a shard into memory, read-only, and check it: uint16 (tokens,).

    Raises:
        UserError: an odd byte count, an id outside GPT-2's vocabulary, or a sidecar that describes another shard.
    """
    size = path.stat().st_size
    if size == 0 or size % DTYPE.itemsize:
        raise UserError(f"{path}: {size} bytes are not a whole number of uint16 tokens; run `dvc repro -f tokenize`")
    shard = np.memmap(path, dtype=DTYPE, mode="r")
    if (largest := int(shard.max())) >= GPT2_VOCAB_SIZE:
        raise UserError(f"{path}: token id {largest} is outside GPT-2's vocabulary of {GPT2_VOCAB_SIZE}")
    if sidecar_path(path).exists():
        sidecar = files.read_json(sidecar_path(path))
        for name, actual in _describe(shard).items():
            if (expected := sidecar.get(name)) != actual:
                raise UserError(
                    f"{path}: {name} {actual}, its sidecar says {expected!r:.80}; run `dvc repro -f tokenize`"
                )
    return shard


def _describe(shard: np.ndarray) -> dict[str, str | int]:
    """Return what the sidecar of `shard` says."""
    return {
        "dtype": "uint16",
        "tokens": len(shard),
        "vocab_size": GPT2_VOCAB_SIZE,
        "sha256": hashlib.sha256(shard.data).hexdigest(),
    }


def count_bytes(ids: Iterable[Tensor], encoder_json: Path) -> int:
    """Return how many bytes of text the tokens in `ids`, int64 of any shape, stand for: <|endoftext|> for none.

    OpenAI's encoder.json, {token: id}, writes each byte of a token as one character.
    """
    encoder = json.loads(encoder_json.read_text(encoding="utf-8"))
    lengths = np.zeros(GPT2_VOCAB_SIZE, dtype=np.int64)
    lengths[list(encoder.values())] = [len(token) for token in encoder]
    lengths[encoder[END_OF_TEXT]] = 0
    return sum(int(lengths[some.numpy()].sum()) for some in ids)


def batches(shard: np.ndarray, batch_size: int, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an endless iterator over (x, y), int64 (B, T) each, in the order of the text; y is x one token later.

    The last tokens that do not fill a batch are left out and the text begins again.

    Raises:
        UserError: the shard is shorter than one batch and the token after it.
    """
    tokens = batch_size * block_size
    if len(shard) < tokens + 1:
        raise UserError(
            f"a shard of {len(shard)} tokens is too short for one batch of batch_size {batch_size} * "
            f"block_size {block_size} tokens and the one after: use a smaller shape or a longer text"
        )
    return _windows(shard, batch_size, block_size)


def _windows(shard: np.ndarray, batch_size: int, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    tokens = batch_size * block_size
    while True:
        for start in range(0, len(shard) - tokens, tokens):
            window = torch.from_numpy(shard[start : start + tokens + 1].astype(np.int64))  # (B * T + 1,)
            yield window[:-1].view(batch_size, block_size), window[1:].view(batch_size, block_size)


def joined(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of `count` batches after another as one batch, int64 (count * B, T) twice."""
    while several := list(islice(batches, count)):
        xs, ys = zip(*several, strict=True)
        yield torch.cat(xs), torch.cat(ys)


def shares(batches: Iterator[tuple[Tensor, Tensor]], rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield those rows of each of `batches` that `rank` of `count` trains on, int64 (B / count, T) twice."""
    for x, y in batches:
        yield x.chunk(count)[rank], y.chunk(count)[rank]


def first_batches(shard: np.ndarray, tokens: int, batch_size: int, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches that predict the first `tokens` tokens of `shard` after its very first, each once.

    Raises:
        UserError: the shard is too short for that.
    """
    if len(shard) < tokens + 1:
        raise UserError(
            f"eval_tokens ({tokens}) is over the {len(shard) - 1} tokens that the validation shard can give"
        )
    return islice(batches(shard, batch_size, block_size), tokens // (batch_size * block_size))
