"""Write token ids to shards, and read batches from shards.

A shard is a file of raw little-endian uint16 token ids without a header, as in nanoGPT. The file `<shard>.json`, its
sidecar, describes it. A shard from another project may have no sidecar.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gpt2_ladder import files
from gpt2_ladder.config import GPT2_VOCAB_SIZE, UserError

DTYPE = np.dtype("<u2")  # ids below 65,536
MANIFEST = "manifest.json"


def write_shard(path: Path, ids: Sequence[int] | np.ndarray) -> None:
    """Write token `ids` to the shard `path` and describe it in its sidecar."""
    # the sidecar is put in place first: if the process is killed then, the shard is missing or does not match it
    with files.replacing(sidecar_path(path), path) as (sidecar, raw):
        raw.write_bytes(np.asarray(ids, dtype=DTYPE).tobytes())
        sidecar.write_text(json.dumps(_describe(raw)[0], indent=2) + "\n")


def sidecar_path(shard: Path) -> Path:
    """Return the path of a shard's sidecar: data/train.bin -> data/train.json."""
    return shard.with_suffix(".json")


def open_shard(path: Path) -> np.memmap:
    """Check a shard and map it into memory, read-only: uint16 (tokens,).

    Raise UserError if it has an odd number of bytes, an id outside GPT-2's vocabulary, or a sidecar of another shard.
    """
    check_shard(path)
    return np.memmap(path, dtype=DTYPE, mode="r")


def check_shard(path: Path) -> str:
    """Check a shard like `open_shard` and return its SHA-256."""
    size = path.stat().st_size
    if size == 0 or size % DTYPE.itemsize:
        raise UserError(f"{path}: {size} bytes are not a whole number of uint16 tokens; run `dvc repro -f tokenize`")
    description, largest = _describe(path)
    if largest >= GPT2_VOCAB_SIZE:
        rule = f"must be below {GPT2_VOCAB_SIZE}, the size of GPT-2's vocabulary"
        raise UserError(f"{path}: token id {largest} {rule}; run `dvc repro -f tokenize`")
    if sidecar_path(path).exists():
        sidecar = files.read_json(sidecar_path(path))
        for name, actual in description.items():
            if (expected := sidecar.get(name)) != actual:
                raise UserError(
                    f"{path}: {name} is {actual}, but its sidecar has {expected!r:.80}; run `dvc repro -f tokenize`"
                )
    return str(description["sha256"])


def _describe(path: Path) -> tuple[dict[str, str | int], int]:
    """Return the sidecar's content for the shard `path`, and the largest id in the shard.

    The file is read in pieces: a memory-mapped file would count as memory of the training.
    """
    digest, tokens, largest = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while raw := file.read(2**24):
            ids = np.frombuffer(raw, DTYPE)
            digest.update(raw)
            tokens, largest = tokens + len(ids), max(largest, int(ids.max()))
    size: dict[str, str | int] = {"dtype": "uint16", "tokens": tokens, "vocab_size": GPT2_VOCAB_SIZE}
    return {**size, "sha256": digest.hexdigest()}, largest


class Shards:
    """Several shards as one sequence of token ids; only the requested slices are read from disk."""

    def __init__(self, paths: Sequence[Path]):
        hashes = "".join(map(check_shard, paths))
        self.sha256 = hashlib.sha256(hashes.encode()).hexdigest()  # SHA-256 of all shards' SHA-256 values
        self._shards = [np.memmap(path, dtype=DTYPE, mode="r") for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(len(self))
        index, parts = int(np.searchsorted(self._ends, start, "right")), []
        while start < stop:
            shard, end = self._shards[index], int(self._ends[index])
            parts.append(shard[start - end + len(shard) : stop - end + len(shard)])
            start, index = end, index + 1
        return np.concatenate(parts) if parts else np.empty(0, DTYPE)


def open_shards(first: Path, folder: Path) -> Shards:
    """Map a corpus into memory: the shard `first`, and the shards that the manifest in `folder` lists.

    Raise UserError if a shard or the manifest is damaged.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {"shards": []}
    paths = [Path(shard["path"]) for shard in manifest["shards"]]
    return Shards([first, *(folder / path.name for path in paths if path.parent.name == folder.name)])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest in `folder`, which lists the shards of a corpus and the files it was made from.

    Raise UserError if the manifest is damaged.
    """
    try:  # not files.read_json: a manifest names every file of the corpus and may be large
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not all(isinstance(shard["path"], str) for shard in manifest["shards"]):
            raise TypeError
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{folder / MANIFEST}: not a manifest of shards; run `dvc repro -f tokenize`") from None
    return manifest


class Batches:
    """An endless iterator over (x, y), int64 (B, T) each; y is x shifted by one token.

    The text is cut into rows of `block_size` tokens. With a `seed`, the rows have a new random order
    in every epoch; without one, the order of the text. Rows that do not fill the last batch of an epoch are left out.

    Attributes:
        tokens: number of tokens in an epoch.
        position: where the next batch is, {"epoch": 0, "batch": 0} at the start; set it to resume.

    Raises:
        UserError: the shard is too short for one batch.
    """

    def __init__(self, shard: np.ndarray | Shards, batch_size: int, block_size: int, seed: int | None = None):
        self._shard, self._batch_size, self._block_size, self._seed = shard, batch_size, block_size, seed
        self._rows = (len(shard) - 1) // block_size
        if self._rows < batch_size:
            raise UserError(
                f"a shard of {len(shard)} tokens is too short: a batch needs batch_size {batch_size} * block_size "
                f"{block_size} + 1 tokens; lower batch_size or block_size in params.yaml, or use a longer text"
            )
        self._count = self._rows // batch_size
        self.tokens = self._count * batch_size * block_size
        self.position = {"epoch": 0, "batch": 0}

    @property
    def position(self) -> dict[str, int]:
        """The position of the next batch."""
        return {"epoch": self._epoch, "batch": self._batch}

    @position.setter
    def position(self, position: Mapping[str, int]) -> None:
        self._epoch, self._batch = position["epoch"], position["batch"]
        self._order: Sequence[int] | np.ndarray = range(self._rows)
        if self._seed is not None:
            rows = np.arange(self._rows, dtype=np.uint32)  # 40 MB for 10B tokens at T=1024
            self._order = np.random.default_rng([self._seed, self._epoch]).permutation(rows)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        B, T = self._batch_size, self._block_size
        rows = [int(row) for row in self._order[self._batch * B : (self._batch + 1) * B]]
        ids = np.stack([self._shard[row * T : row * T + T + 1] for row in rows]).astype(np.int64)  # (B, T + 1)
        self._batch += 1
        if self._batch == self._count:
            self.position = {"epoch": self._epoch + 1, "batch": 0}
        window = torch.from_numpy(ids)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def concatenate(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Concatenate every `count` consecutive batches into one: a pair of int64 (count * B, T)."""
    while group := list(islice(batches, count)):
        xs, ys = zip(*group, strict=True)
        yield torch.cat(xs), torch.cat(ys)


def local_rows(batches: Iterator[tuple[Tensor, Tensor]], rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, from each batch, the rows for rank `rank` of `count` ranks: a pair of int64 (B / count, T)."""
    for x, y in batches:
        yield x.chunk(count)[rank], y.chunk(count)[rank]


def first_batches(shard: np.ndarray, tokens: int, batch_size: int, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over the first batches of `shard`, which together have `tokens` targets.

    Raise UserError if the shard is too short.
    """
    if len(shard) < tokens + 1:
        raise UserError(
            f"eval_tokens = {tokens}, but the validation shard has {len(shard) - 1} tokens: lower eval_tokens"
        )
    return islice(Batches(shard, batch_size, block_size), tokens // (batch_size * block_size))
