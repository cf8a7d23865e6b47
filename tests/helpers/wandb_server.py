"""A W&B server on 127.0.0.1 that accepts runs or fails as a test needs, and a reader of offline runs."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import wandb

from helpers import faulty_server

KEY = "5ec2e7" * 7


def records(folder: Path) -> dict[str, list[dict]]:
    """Read the records of an offline run with W&B's own reader, by their type."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, list[dict]] = {}
    for record in map(json.loads, output.splitlines()):
        result.setdefault(record["type"], []).append(record[record["type"]])
    return result


def forget_user(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Remove the user's W&B and DVC settings from this process; `folder` would contain a key."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    wandb.teardown()  # W&B reads the environment once per process


def log_in(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Log this process in to the W&B server at `url`."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    wandb.teardown()


@contextmanager
def serve(fault: str = "", starts: bool = True) -> Iterator[tuple[str, list[bytes]]]:
    """Serve W&B's client; yield the address and the growing list of received requests.

    Every request meets `fault` except, if `starts`, the first one of a run. The fault "{}" is an empty answer.
    """
    sent: list[bytes] = []
    turn, resume = threading.Lock(), threading.Event()
    url = "http://127.0.0.1"
    project = {"id": "p", "name": "gpt2-ladder", "entity": {"id": "e", "name": "me"}}
    bucket = {"id": "b", "displayName": "r", "config": "{}", "project": project, "historyLineCount": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = self.rfile.read(int(self.headers["Content-Length"]))
            with turn:
                first = starts and not any(b"mutation UpsertBucket" in earlier for earlier in sent)
                sent.append(request)
            answer: dict = {}
            if b"mutation UpsertBucket" in request and (first or not fault):
                name = json.loads(request)["variables"]["name"]
                answer = {"data": {"upsertBucket": {"bucket": {**bucket, "name": name}, "inserted": True}}}
            elif b"mutation CreateRunFiles" in request:
                files = [{"name": name, "uploadUrl": url} for name in json.loads(request)["variables"]["files"]]
                answer = {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
            elif b"mutation CreateArtifact" in request:  # of a table; W&B's client crashes if the answer is empty
                answer = {"errors": [{"message": "this server keeps no artifacts"}]}
            elif b"mutation CreateCustomChart" in request:
                answer = {"data": {"createCustomChart": {"chart": {"id": "me/gpt2-ladder-gains"}}}}
            elif b"viewer" in request:
                answer = {"data": {"viewer": {"id": "e", "entity": "me", "username": "me", "flags": "{}"}}}
            body = b"{}" if fault == "{}" and not first else json.dumps(answer).encode()
            faulty_server.answer(self, body, "" if first or fault == "{}" else fault, resume=resume)

        do_PUT = do_GET = do_POST  # noqa: N815  names that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield url, sent
    finally:
        resume.set()
        server.shutdown()
        server.server_close()
