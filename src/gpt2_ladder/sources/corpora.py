"""Write a corpus of any size as shards with a fixed number of tokens, in the order of its documents.

Files are read in pieces, several processes tokenize the pieces, and the tokens are cut into shards, so memory does not
grow with the corpus. A manifest records the settings, the input files, and the position where each shard ends. After an
interruption, the next run continues after the last complete shard.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import chain, islice, repeat
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiktoken

from gpt2_ladder import files
from gpt2_ladder.config import Data, UserError
from gpt2_ladder.sources import documents, downloads, hub_download
from gpt2_ladder.sources.documents import Piece
from gpt2_ladder.training import data, tokenizer

FINEWEB = "HuggingFaceFW/fineweb-edu"
FINEWEB_COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
FINEWEB_FILES = [f"sample/10BT/{number:03}_00000.parquet" for number in range(14)]  # 28.5 GB, 9,672,101 documents
VERSION = 2  # increase it after a change to how pieces are cut or tokenized
AHEAD = 4  # pieces in the queue for each process
_encoding = cache(tokenizer.open_encoding)  # opened once in each process


def encode(vocab_bpe: Path, encoder_json: Path, piece: Piece) -> np.ndarray:
    """Return the tokens of `piece`, uint16 (tokens,)."""
    encoding = _encoding(vocab_bpe, encoder_json)
    end = np.array([encoding.eot_token])
    # encode each text separately, so that "<|endoftext|>" inside a text is encoded like other text
    parts = [part for text in piece for part in (end, encoding.encode_to_numpy(text, disallowed_special=()))]
    return np.concatenate(parts[1:]).astype(data.DTYPE)


def write(
    settings: Data, vocab_bpe: Path, encoder_json: Path, val: Path, train: Path, folder: Path, processes: int
) -> None:
    """Write a corpus as shards: first `val`, then `train`, then 000001.bin and so on in `folder`.

    Raise UserError if a file cannot be downloaded or read, or if the corpus is too small.
    """
    inputs = _inputs(settings)
    versions = [VERSION, documents.PIECE, pa.__version__, tiktoken.__version__]  # positions depend on these
    made_of = {**settings.model_dump(exclude={"shuffle"}), "cut": versions, "inputs": inputs}
    shards = _complete_shards(folder, made_of)
    position = shards[-1]["next"] if shards else {"file": 0, "piece": 0, "token": 1}  # token 0 is <|endoftext|>
    if shards:
        print(f"{folder}: resuming after {len(shards)} shards", flush=True)
    sizes = chain((settings.val_tokens,), repeat(settings.shard_tokens))
    _encoding(vocab_bpe, encoder_json)  # before the fork, so that all processes share it
    pieces = _pieces(settings, list(inputs), position, folder)
    tokens = _in_order(partial(encode, vocab_bpe, encoder_json), pieces, processes)
    start = time.perf_counter()
    for ids, end in cut(tokens, position["token"], islice(sizes, len(shards), None)):
        if not (number := len(shards)):  # delete old shards only now, when the first new shard is ready
            for old in (train, *folder.glob("[!.]*")):
                old.unlink(missing_ok=True)
        path = (val, train)[number] if number < 2 else folder / f"{number - 1:06}.bin"
        data.write_shard(path, ids)
        shards.append({**describe(path), "next": end})
        write_manifest(folder, made_of, shards)
        print(f"{path}: {len(ids):,} tokens, {len(ids) / (time.perf_counter() - start):,.0f} tokens/s", flush=True)
        start = time.perf_counter()
    if not shards:
        raise UserError(f"data.path = {settings.path}: contains no text; set another data.path or data.column")
    if len(shards) < 2:
        raise UserError(f"data.val_tokens = {settings.val_tokens}: leaves no training tokens; reduce data.val_tokens")


def describe(shard: Path) -> dict[str, Any]:
    """Return the manifest entry of `shard`, read from its sidecar file."""
    sidecar = files.read_json(data.sidecar_path(shard))
    return {"path": str(shard), "tokens": sidecar["tokens"], "sha256": sidecar["sha256"]}


def write_manifest(folder: Path, made_of: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> None:
    """Write the manifest of a corpus: the settings and input files in `made_of`, and the `shards` in order."""
    files.write(folder / data.MANIFEST, json.dumps({"made_of": made_of, "shards": shards}, indent=1) + "\n")


def cut(
    pieces: Iterable[tuple[int, int, np.ndarray]], skip: int, sizes: Iterator[int]
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """Cut tokens into arrays of the given `sizes`, and yield each array with the position where it ends.

    `pieces` yields (number of the file, number of the piece in the file, tokens). Drop the first `skip` tokens.
    """
    parts, missing = list[np.ndarray](), next(sizes)
    for file, number, ids in pieces:
        used, skip = skip, 0
        while used < len(ids):
            parts.append(ids[used : used + missing])
            used, missing = used + len(parts[-1]), missing - len(parts[-1])
            if not missing:
                yield np.concatenate(parts), {"file": file, "piece": number, "token": used}
                parts, missing = [], next(sizes)
    if parts:
        yield np.concatenate(parts), {"file": file + 1, "piece": 0, "token": 0}


def _inputs(settings: Data) -> dict[str, str]:
    """Return the files of a corpus, each with its SHA-256 or commit."""
    if settings.source == "fineweb-edu":
        return dict.fromkeys(FINEWEB_FILES, FINEWEB_COMMIT)
    path, suffix = Path(settings.path), {"text": ".txt", "parquet": ".parquet"}[settings.source]
    below = [file for file in path.rglob(f"*{suffix}") if file.is_file() and "/." not in f"/{file.relative_to(path)}"]
    if not (paths := [path] if path.is_file() else sorted(below)):
        raise UserError(f"data.path = {path}: not a file or a folder with *{suffix} files; set data.path to one")
    size = sum(file.stat().st_size for file in paths)  # a token has at least a byte; 3 bytes may be a byte order mark
    if settings.source == "text" and size > 3 and size + len(paths) <= settings.val_tokens + 1:
        raise UserError(f"data.val_tokens = {settings.val_tokens}: only {size:,} bytes of text; reduce data.val_tokens")
    return {str(file): files.sha256(file) for file in paths}


def _complete_shards(folder: Path, made_of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the shards of the corpus `made_of` in `folder`, up to the first missing or damaged shard."""
    for left in folder.glob(".*"):  # temporary folders of killed runs
        shutil.rmtree(left)
    complete = []
    with suppress(FileNotFoundError, UserError):
        manifest = data.read_manifest(folder)
        for shard in manifest["shards"] if manifest.get("made_of") == made_of else ():
            if data.check_shard(Path(shard["path"])) != shard["sha256"]:
                break
            complete.append(shard)
    return complete


def _pieces(
    settings: Data, inputs: Sequence[str], position: Mapping[str, int], folder: Path
) -> Iterator[tuple[int, int, Piece]]:
    """Yield (number of the file, number of the piece in the file, piece) for all `inputs`, starting at `position`."""
    for file in range(position["file"], len(inputs)):
        opened = _fineweb(inputs[file], folder) if settings.source == "fineweb-edu" else nullcontext(Path(inputs[file]))
        with opened as path:
            pieces = documents.pieces(path, None if settings.source == "text" else settings.column)
            first = position["piece"] if file == position["file"] else 0
            yield from ((file, number, piece) for number, piece in islice(enumerate(pieces), first, None))


def _in_order(
    encode_piece: Callable[[Piece], np.ndarray], pieces: Iterable[tuple[int, int, Piece]], processes: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Tokenize `pieces` in several `processes`, and yield the tokens in order, with only a few pieces in memory.

    Threads would wait for each other while they build lists of tokens: two threads had 0.7 times the speed of one.
    """
    waiting = deque[tuple[int, int, Future[np.ndarray]]]()
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _end_with_parent) as pool:
            pool.submit(int).result()  # fork now, before reading starts threads, and share loaded modules
            for file, number, piece in pieces:
                waiting.append((file, number, pool.submit(encode_piece, piece)))
                if len(waiting) > AHEAD * processes:
                    file, number, future = waiting.popleft()
                    yield file, number, future.result()
            yield from ((file, number, future.result()) for file, number, future in waiting)
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed; free some memory and run `dvc repro` again") from None


def _end_with_parent() -> None:
    """End this process when its parent ends; otherwise it would survive a killed parent."""

    def wait(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, args=(multiprocessing.parent_process(),), daemon=True).start()


@contextmanager
def _fineweb(name: str, folder: Path) -> Iterator[Path]:
    """Download a file of FineWeb-Edu to `folder`, yield its path, and delete the file afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=downloads.UNFINISHED) as temporary:
        fix = "download its files by hand and set data.source: parquet"
        yield hub_download.fetch(FINEWEB, name, FINEWEB_COMMIT, fix, Path(temporary), "dataset")
