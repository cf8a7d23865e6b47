"""Token ids -> shards, and shards -> batches.

A shard is nanoGPT's: raw little-endian uint16 token ids without a header, so shards can be shared with it. A sidecar
`<shard>.json` holds what the shard must be; a shard from elsewhere may come without one.
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

DTYPE = np.dtype("<u2")  # two bytes hold every id below 65,536
MANIFEST = "manifest.json"


def check_vocabulary(largest: int) -> None:
    """Raise UserError where an encoding's `largest` id is one that a shard cannot hold."""
    if largest > (room := np.iinfo(DTYPE).max):
        raise UserError(
            f"the encoding's ids go up to {largest:,}, and two bytes hold {room:,}; use GPT-2's, or make the shards' "
            "DTYPE uint32"
        )


def write_shard(path: Path, ids: Sequence[int] | np.ndarray) -> None:
    """Write token `ids` as a shard, and its sidecar beside it."""
    # the sidecar takes its place first: interrupted between the two, no shard or another one is beside it
    with files.replacing(sidecar_path(path), path) as (sidecar, raw):
        raw.write_bytes(np.asarray(ids, dtype=DTYPE).tobytes())
        sidecar.write_text(json.dumps(_describe(raw)[0], indent=2) + "\n")


def sidecar_path(shard: Path) -> Path:
    """Return where the sidecar of `shard` lies: data/train.bin -> data/train.json."""
    return shard.with_suffix(".json")


def open_shard(path: Path) -> np.memmap:
    """Map a shard into memory, read-only, and check it: uint16 (tokens,).

    Raises:
        UserError: an odd byte count, an id outside GPT-2's vocabulary, or a sidecar that describes another shard.
    """
    check_shard(path)
    return np.memmap(path, dtype=DTYPE, mode="r")


def check_shard(path: Path) -> str:
    """Return the SHA-256 of a shard; raise UserError as `open_shard` does."""
    size = path.stat().st_size
    if size == 0 or size % DTYPE.itemsize:
        raise UserError(f"{path}: {size} bytes are not a whole number of uint16 tokens; run `dvc repro -f tokenize`")
    found, largest = _describe(path)
    if largest >= GPT2_VOCAB_SIZE:
        raise UserError(f"{path}: token id {largest} is outside GPT-2's vocabulary of {GPT2_VOCAB_SIZE}")
    if sidecar_path(path).exists():
        sidecar = files.read_json(sidecar_path(path))
        for name, actual in found.items():
            if (expected := sidecar.get(name)) != actual:
                raise UserError(
                    f"{path}: {name} {actual}, its sidecar says {expected!r:.80}; run `dvc repro -f tokenize`"
                )
    return str(found["sha256"])


def _describe(path: Path) -> tuple[dict[str, str | int], int]:
    """Return what the sidecar of the shard at `path` says, and the largest id in it.

    Read a piece at a time and not mapped, since what is mapped counts as a training's memory.
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
    """Several shards as one: a sequence of token ids, of which only what is asked for is read from the disk.

    Attributes:
        sha256: of their SHA-256, one after the other.
    """

    def __init__(self, paths: Sequence[Path]):
        hashes = "".join(map(check_shard, paths))
        self.sha256 = hashlib.sha256(hashes.encode()).hexdigest()
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
    """Map a corpus into memory: the shard `first`, and those in `folder` that its manifest names, if it has one.

    Raises:
        UserError: one of them is damaged (`open_shard`), or the manifest is.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {"shards": []}
    paths = [Path(shard["path"]) for shard in manifest["shards"]]
    return Shards([first, *(folder / path.name for path in paths if path.parent.name == folder.name)])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the corpus in `folder` is made of, and its shards.

    It may be of any size: it names every file that was read.

    Raises:
        UserError: it is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not all(isinstance(shard["path"], str) for shard in manifest["shards"]):
            raise TypeError
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{folder / MANIFEST}: no manifest of shards; run `dvc repro -f tokenize`") from None
    return manifest


class Batches:
    """An endless iterator over (x, y), int64 (B, T) each; y is x one token later.

    A row is `block_size` tokens at a multiple of it; rows come in the order of the text, or shuffled by `seed`, anew in
    every epoch. The last ones that do not fill a batch are left out and the next epoch begins.

    Attributes:
        tokens: that one epoch trains on.
        position: of the next batch, as JSON: {"epoch": 0, "batch": 0} at the start. Whoever sets it goes on from there.

    Raises:
        UserError: the shard is shorter than one batch and the token after it.
    """

    def __init__(self, shard: np.ndarray | Shards, batch_size: int, block_size: int, seed: int | None = None):
        self._shard, self._batch_size, self._block_size, self._seed = shard, batch_size, block_size, seed
        self._rows = (len(shard) - 1) // block_size
        if self._rows < batch_size:
            raise UserError(
                f"a shard of {len(shard)} tokens is too short for one batch of batch_size {batch_size} * "
                f"block_size {block_size} tokens and the one after: use a smaller shape or a longer text"
            )
        self._count = self._rows // batch_size
        self.tokens = self._count * batch_size * block_size
        self.position = {"epoch": 0, "batch": 0}

    @property
    def position(self) -> dict[str, int]:
        """Where the next batch lies."""
        return {"epoch": self._epoch, "batch": self._batch}

    @position.setter
    def position(self, position: Mapping[str, int]) -> None:
        epoch, batch = position.get("epoch"), position.get("batch")
        if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 <= batch < self._count):
            raise ValueError(f"{position!r:.80} is not a position in {self._count} batches")
        self._epoch, self._batch = epoch, batch
        self._order: Sequence[int] | np.ndarray = range(self._rows)
        if self._seed is not None:
            rows = np.arange(self._rows, dtype=np.uint32)  # 40 MB of 10B tokens at T=1024
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
    """Yield the rows of `count` batches after another as one batch, int64 (count * B, T) twice."""
    while several := list(islice(batches, count)):
        xs, ys = zip(*several, strict=True)
        yield torch.cat(xs), torch.cat(ys)


def local_rows(batches: Iterator[tuple[Tensor, Tensor]], rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
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
    return islice(Batches(shard, batch_size, block_size), tokens // (batch_size * block_size))
