"""Write files completely or not at all, check them, and read JSON files that the user may have changed."""

import errno
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2_ladder.config import UserError

ERROR_FILE = "GPT2_LADDER_ERROR_FILE"  # environment variable: the file to which a rank writes its error
REPEAT_DOWNLOAD = "run `dvc repro -f download`"


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path for each of `paths`, all in one folder; if the block succeeds, put them in place in order.

    All files are on the disk before the first is put in place. If the block fails, existing files are not changed.
    A link is replaced, never written through, because it may point into DVC's cache.
    """
    parent = paths[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    # in a folder, because only the owner could read files made by tempfile
    with tempfile.TemporaryDirectory(dir=parent, prefix=".writing-") as folder:
        temporary = tuple(Path(folder) / path.name for path in paths)
        try:
            yield temporary
            plain = Path(folder) / "plain"
            plain.touch()
            for path in temporary:
                path.chmod(plain.stat().st_mode)  # the mode that open() sets; safetensors' files are private
                _sync(path)
        except Exception as error:
            if disk_is_full(error):  # a failed write does not name its file; only OSError declares filename
                error.filename = getattr(error, "filename", None) or str(paths[0])  # type: ignore[attr-defined]
            raise
        for written, path in zip(temporary, paths, strict=True):
            written.replace(path)
    _sync(parent)


def write(path: Path, content: str | bytes) -> None:
    """Write `content`, text as UTF-8, to `path`, completely or not at all."""
    with replacing(path) as (temporary,):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path`; raise ValueError for NaN and infinity, which are not JSON."""
    write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def disk_is_full(error: BaseException) -> bool:
    """Return whether a full disk or quota caused `error`.

    Compare texts, because safetensors raises no OSError, and torch.save another error after the OSError.
    """
    return any(os.strerror(code) in f"{error} {error.__context__}" for code in (errno.ENOSPC, errno.EDQUOT))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str | None, source: object = None, fix: str = REPEAT_DOWNLOAD) -> None:
    """Raise UserError if the SHA-256 of `path` is not `expected`. The message has `source` (or `path`) and `fix`."""
    if (actual := sha256(path)) != expected:
        raise UserError(f"{source or path}: sha256 is {actual}, expected {expected}: changed or incomplete; {fix}")


def forget_damaged(paths: Iterable[Path]) -> None:
    """Remove damaged copies of `paths` from DVC's cache, so that DVC does not restore them."""
    from dvc.exceptions import DvcException  # imported late, because they take 0.5 s
    from dvc.repo import Repo
    from dvc_data.hashfile.hash import file_md5

    try:
        cache = Repo().cache.local
    except DvcException:  # this is no DVC repository, or no Git repository
        return
    for path in paths:
        md5 = file_md5(str(path))
        cached = Path(cache.oid_to_path(md5))
        if cached.exists() and file_md5(str(cached)) != md5:
            cached.unlink()
            print(f"{path}: removed its damaged copy from DVC's cache ({cached})", flush=True)


def git(*arguments: str) -> str | None:
    """Return the output of a git command; None if it fails or there is no Git."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def printable(text: str) -> str:
    """Return `text` with its control characters escaped, so that a terminal does not execute them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raise UserError if it has none."""
    try:
        if not isinstance(content := json.loads(path.read_bytes()), dict):
            raise ValueError(f"a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object: {error}; create or download the file again") from None
    return content


def _sync(path: Path) -> None:
    """Flush the file or folder to the disk; a full disk may raise its error only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
