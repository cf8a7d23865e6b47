"""Write a corpus of any size as shards with a fixed number of tokens, in the order of its documents.

Files are read in pieces, several processes tokenize the pieces, and the tokens are cut into shards, so memory does not
grow with the corpus. A manifest records what the shards were made of and where each ends; after an interruption the
next run resumes behind the last complete shard.
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

import huggingface_hub
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
VERSION = 2  # raise it when pieces are cut or tokenized in another way
AHEAD = 4  # pieces waiting for each process
_encoding = cache(tokenizer.open_encoding)  # once in each process


def encode(vocab_bpe: Path, encoder_json: Path, piece: Piece) -> np.ndarray:
    """Return the tokens of `piece`, uint16 (tokens,)."""
    encoding = _encoding(vocab_bpe, encoder_json)
    end = np.array([encoding.eot_token])
    # encode each text separately, so that an <|endoftext|> inside it is plain text
    parts = [part for text in piece for part in (end, encoding.encode_to_numpy(text, disallowed_special=()))]
    return np.concatenate(parts[1:]).astype(data.DTYPE)


def write(
    settings: Data, vocab_bpe: Path, encoder_json: Path, val: Path, train: Path, folder: Path, processes: int
) -> None:
    """Write a corpus as shards: `val`, then `train`, then 000001.bin and so on in `folder`.

    Raise UserError if a file cannot be downloaded or read, or the corpus is too small.
    """
    inputs = _inputs(settings)
    versions = [VERSION, documents.PIECE, pa.__version__, tiktoken.__version__]  # positions depend on them
    made_of = {**settings.model_dump(exclude={"shuffle"}), "cut": versions, "inputs": inputs}
    shards = _complete_shards(folder, made_of)
    position = shards[-1]["next"] if shards else {"file": 0, "piece": 0, "token": 1}  # skips the first <|endoftext|>
    if shards:
        print(f"{folder}: resuming after {len(shards)} shards", flush=True)
    sizes = chain((settings.val_tokens,), repeat(settings.shard_tokens))
    _encoding(vocab_bpe, encoder_json)  # once for all processes
    pieces = _pieces(settings, list(inputs), position, folder)
    tokens = _in_order(partial(encode, vocab_bpe, encoder_json), pieces, processes)
    start = time.perf_counter()
    for ids, end in cut(tokens, position["token"], islice(sizes, len(shards), None)):
        if not (number := len(shards)):  # not earlier: an error in the first shard leaves those of another corpus
            for old in (train, *folder.glob("[!.]*")):
                old.unlink(missing_ok=True)
        path = (val, train)[number] if number < 2 else folder / f"{number - 1:06}.bin"
        data.write_shard(path, ids)
        shards.append({**describe(path), "next": end})
        write_manifest(folder, made_of, shards)
        print(f"{path}: {len(ids):,} tokens, {len(ids) / (time.perf_counter() - start):,.0f} tokens/s", flush=True)
        start = time.perf_counter()
    if not shards:
        raise UserError(f"data.path = {settings.path}: contains no text; name another corpus, or set data.column")
    if len(shards) < 2:
        raise UserError(f"data.val_tokens = {settings.val_tokens}: leaves no tokens for training; lower it")


def describe(shard: Path) -> dict[str, Any]:
    """Return a shard's entry in the manifest, from its sidecar."""
    sidecar = files.read_json(data.sidecar_path(shard))
    return {"path": str(shard), "tokens": sidecar["tokens"], "sha256": sidecar["sha256"]}


def write_manifest(folder: Path, made_of: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> None:
    """Write what a corpus was made of, and its shards in order."""
    files.write(folder / data.MANIFEST, json.dumps({"made_of": made_of, "shards": shards}, indent=1) + "\n")


def cut(
    pieces: Iterable[tuple[int, int, np.ndarray]], skip: int, sizes: Iterator[int]
) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
    """Yield the tokens of `pieces` without the first `skip` in arrays of `sizes`, and the position where each ends.

    Each piece comes with its file's number and its number in the file.
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
        raise UserError(f"data.path = {path}: not a file or a folder with *{suffix} files; name one that exists")
    size = sum(file.stat().st_size for file in paths)  # a token has at least a byte; 3 bytes may be a byte order mark
    if settings.source == "text" and size > 3 and size + len(paths) <= settings.val_tokens + 1:
        raise UserError(f"data.val_tokens = {settings.val_tokens}: the corpus has only {size:,} bytes; lower it")
    return {str(file): files.sha256(file) for file in paths}


def _complete_shards(folder: Path, made_of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the existing shards of the same corpus, up to the first that is missing or damaged."""
    for left in folder.glob(".*"):  # from a run that was killed
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
    """Yield the pieces of all `inputs` from `position`, each with its file's number and its number in the file."""
    for file in range(position["file"], len(inputs)):
        opened = _fineweb(inputs[file], folder) if settings.source == "fineweb-edu" else nullcontext(Path(inputs[file]))
        with opened as path:
            pieces = documents.pieces(path, None if settings.source == "text" else settings.column)
            first = position["piece"] if file == position["file"] else 0
            yield from ((file, number, piece) for number, piece in islice(enumerate(pieces), first, None))


def _in_order(
    encode_piece: Callable[[Piece], np.ndarray], pieces: Iterable[tuple[int, int, Piece]], processes: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield the tokens of `pieces` in order, from several `processes`; only a few pieces are in memory at once.

    Processes, because threads wait for each other while lists of tokens are built: two had 0.7 times the speed of one.
    """
    if processes == 1:
        yield from ((file, number, encode_piece(piece)) for file, number, piece in pieces)
        return
    waiting = deque[tuple[int, int, Future[np.ndarray]]]()
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _end_with_parent) as pool:
            pool.submit(int).result()  # fork now: processes share what is loaded, and reading will start threads
            for file, number, piece in pieces:
                waiting.append((file, number, pool.submit(encode_piece, piece)))
                if len(waiting) > AHEAD * processes:
                    file, number, future = waiting.popleft()
                    yield file, number, future.result()
            yield from ((file, number, future.result()) for file, number, future in waiting)
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed, perhaps for lack of memory; run `dvc repro` again") from None


def _end_with_parent() -> None:
    """End this process when its parent is killed, which would not end it otherwise."""

    def wait(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, args=(multiprocessing.parent_process(),), daemon=True).start()


@contextmanager
def _fineweb(name: str, folder: Path) -> Iterator[Path]:
    """Download a file of FineWeb-Edu to `folder`, yield its path, and remove it again."""
    fix = "fetch its files by hand and use data.source: parquet"
    try:
        hub_download.probe(huggingface_hub.hf_hub_url(FINEWEB, name, repo_type="dataset", revision=FINEWEB_COMMIT))
    except downloads.Unreachable as failure:
        raise UserError(f"data.source = fineweb-edu: the hub cannot be reached: {failure}; {fix}") from None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=downloads.UNFINISHED) as temporary:
        yield hub_download.fetch(FINEWEB, name, FINEWEB_COMMIT, fix, Path(temporary), "dataset")
