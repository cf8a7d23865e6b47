"""Hubs that fail during a download or are hostile; the contents of the files do not matter."""

import hashlib
import io
import itertools
import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import constants

from gpt2_ladder import files
from gpt2_ladder.config import ModelSize, Pretrained, UserError
from gpt2_ladder.sources import downloads, hub_format, pretrained
from helpers import fake_hub, faulty_server

CONTENT = {hub_format.CONFIG: b"{}\n", hub_format.WEIGHTS: bytes(range(256)) * 9}
SIZE = ModelSize(n_layer=2, n_head=2, n_embd=16, n_positions=32, learning_rate=1e-3, overfit_loss=1.0)
PLANTED = "planted-password"
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
OURS = ["reset", "reset halfway", "short", "500", "502", "503"]  # retried by us, the others by huggingface_hub


@pytest.fixture(autouse=True)
def impatient(monkeypatch, waits):
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained, "SHA256", {"gpt2": HASHES})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the files of a previous download."""
    folder = tmp_path / "data" / "gpt2"
    folder.mkdir(parents=True)
    for name in CONTENT:
        (folder / name).write_bytes(b"previous")
        downloads.write_provenance(folder / name, "previous", "?")
    return folder


@pytest.fixture
def fetch(tmp_path, folder, monkeypatch, capsys):
    """A function that fetches into `folder` from a hub with these options, and checks that no password leaks.

    `fetch.gets` counts the requests for the weights, `fetch.printed` is what huggingface_hub printed.
    """
    published = tmp_path / "published"
    published.mkdir()
    for name, content in CONTENT.items():
        (published / name).write_bytes(content)
    monkeypatch.setenv("HF_TOKEN", f"hf_{PLANTED}")
    stderr = io.StringIO()
    monkeypatch.setattr(logging.getLogger("huggingface_hub").handlers[0], "stream", stderr)

    def fetch(model: str = "gpt2", **options: object) -> None:
        error = ""
        with fake_hub.serve(published, pretrained.REVISIONS[model], **options) as (endpoint, requests):
            mirror = endpoint.replace("//", f"//user:{PLANTED}@")
            template = f"{mirror}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            try:
                pretrained.fetch(folder, Pretrained(source="auto", folder=None), model, SIZE, seed=1)
            except UserError as refused:
                error = str(refused)
                raise
            finally:
                fetch.gets = sum(request.startswith(fake_hub.WEIGHTS_THEMSELVES) for request in requests)
                fetch.printed = stderr.getvalue()
                everything = [
                    *map(str.encode, (error, fetch.printed, capsys.readouterr().out)),
                    *contents(tmp_path).values(),
                ]
                assert not [text for text in everything if PLANTED.encode() in text]

    return fetch


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fault", [fault for fault in faulty_server.PASSING if fault != "flip"])
def test_weights_that_fail_once_come_at_the_second_try(fetch, folder, fault):
    fetch(faults=[fault])
    assert (folder / hub_format.WEIGHTS).read_bytes() == CONTENT[hub_format.WEIGHTS]
    assert fetch.gets == 2


@pytest.mark.parametrize("fault", [*faulty_server.PASSING, "401", "403", "404"])
def test_weights_that_never_come_are_an_error_and_previous_files_stay(fetch, folder, fault):
    before = contents(folder)
    with pytest.raises(UserError, match=r"model\.safetensors: ") as error:
        fetch(faults=itertools.repeat(fault))
    assert "\n" not in str(error.value)
    assert "again" in str(error.value)
    assert contents(folder) == before
    assert fetch.gets == (1 if fault in ("flip", "401", "403", "404") else 3 if fault in OURS else 6)


def test_later_downloads_of_a_larger_size_must_equal_the_first(fetch, folder):
    fetch("gpt2-xl")
    record = downloads.provenance_path(folder / hub_format.WEIGHTS)
    assert json.loads(record.read_text())["sha256"] == HASHES[hub_format.WEIGHTS]
    (folder / hub_format.WEIGHTS).unlink()
    before = contents(folder)
    with pytest.raises(UserError, match=f"expected {HASHES[hub_format.WEIGHTS]}: .*, or delete {record} to accept"):
        fetch("gpt2-xl", faults=["flip"])
    assert contents(folder) == before
    fetch("gpt2-xl")
    assert (folder / hub_format.WEIGHTS).read_bytes() == CONTENT[hub_format.WEIGHTS]
    fetch("gpt2-xl")
    assert fetch.gets == 0  # keeps files that match the record


def test_the_record_of_one_size_is_not_used_for_another(fetch, folder):
    fetch("gpt2-xl")
    fetch("gpt2-medium", faults=["flip"])
    record = json.loads(downloads.provenance_path(folder / hub_format.WEIGHTS).read_text())
    assert "/openai-community/gpt2-medium/resolve/" in record["source"]
    assert record["sha256"] == files.sha256(folder / hub_format.WEIGHTS) != HASHES[hub_format.WEIGHTS]


def test_a_mirrors_password_is_never_printed(fetch, folder):
    with pytest.raises(UserError, match=r"^http://\*\*\*@127.*: the hub responded, but.*for url 'http://\*\*\*@127"):
        fetch(faults=["401"], at="GET /openai-community/gpt2")
    fetch(faults=["cut"], at="GET /openai-community/gpt2")
    assert "Error while downloading from http://***@127.0.0.1" in fetch.printed
    provenance = json.loads(downloads.provenance_path(folder / hub_format.WEIGHTS).read_text())
    assert provenance["source"].startswith("http://***@127.0.0.1")


THEIR_HEAD = "HEAD /lfs/"  # of several values huggingface_hub uses the last
REDIRECT = f"HEAD /openai-community/gpt2/resolve/{pretrained.REVISIONS['gpt2']}/{hub_format.WEIGHTS}"
HOSTILE = {
    (fake_hub.WEIGHTS_THEMSELVES, "Content-Disposition"): ["attachment; filename=../../evil", "filename=OUTSIDE/evil"],
    (fake_hub.WEIGHTS_THEMSELVES, "Content-Encoding"): ["gzip"],
    (fake_hub.WEIGHTS_THEMSELVES, "Content-Range"): ["bytes 1-0/-1"],
    (fake_hub.WEIGHTS_THEMSELVES, "Retry-After"): ["9" * 400],
    (THEIR_HEAD, "X-Linked-Etag"): ["../../evil", "/../../../../evil", "OUTSIDE/evil", "", "a" * 300],
    (THEIR_HEAD, "X-Repo-Commit"): ["../../..", "OUTSIDE", ""],
    (THEIR_HEAD, "X-Linked-Size"): ["-1", "0", "1", "60000000000", "many"],
    (THEIR_HEAD, "X-Xet-Hash"): ["../../evil", "0" * 64],
    (REDIRECT, "Location"): ["file:///etc/passwd", "http://[", "http://127.0.0.1:99999/", "//", "../../../evil", ""],
}


def test_a_refusal_is_reported_with_its_status(fetch):
    with pytest.raises(UserError, match=r"model\.safetensors: the server answered 403 "):
        fetch(faults=["403"], at=REDIRECT)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub trusts the size in the header
@pytest.mark.parametrize(("at", "header", "value"), [(*key, value) for key in HOSTILE for value in HOSTILE[key]])
def test_no_word_of_a_hub_leads_out_of_the_folder(fetch, folder, tmp_path, at, header, value):
    (tmp_path / "cached").write_bytes(b"cached")
    (folder / hub_format.WEIGHTS).unlink()
    (folder / hub_format.WEIGHTS).symlink_to(tmp_path / "cached")  # as DVC does
    before = contents(tmp_path)
    error = ""
    try:
        faults = ["429"] if header == "Retry-After" else []
        fetch(faults=faults, at=at, headers={header: value.replace("OUTSIDE", str(tmp_path))})
    except UserError as refused:
        error = str(refused)
    after = contents(tmp_path)
    if error:
        assert hub_format.WEIGHTS in error
        assert "\n" not in error
        assert after == before
    else:
        assert not (folder / hub_format.WEIGHTS).is_symlink()
        assert (folder / hub_format.WEIGHTS).read_bytes() == CONTENT[hub_format.WEIGHTS]
        assert after.keys() == before.keys()
        assert after["cached"] == b"cached"
