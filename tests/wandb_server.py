"""A W&B server on 127.0.0.1: it takes runs, knows runs, and goes wrong as a test asks it to."""

import http.server
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import faulty_server
import pytest
import wandb

KEY = "5ec2e7" * 7


def forget_user(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Take the user's settings of W&B and DVC from this process; his key would lie in `folder`."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    wandb.teardown()  # W&B reads the environment once a process


def log_in(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make of this process one of a user of the W&B server at `url`."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    wandb.teardown()


@contextmanager
def serve(fault: str = "", starts: bool = True, runs: Sequence[dict] = ()) -> Iterator[tuple[str, list[bytes]]]:
    """Serve what W&B's client needs; yield the address and the growing list of what it sends.

    All requests meet `fault`, but the one with which a run `starts`. "{}" is an answer that lacks all that was asked.
    Asked for the runs of the project gpt2-ladder, it gives those of `runs` whose fields the filter names.
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
                first = starts and not any(b"mutation UpsertBucket" in one for one in sent)
                sent.append(request)
            answer: dict = {}
            if b"mutation UpsertBucket" in request and (first or not fault):
                name = json.loads(request)["variables"]["name"]
                answer = {"data": {"upsertBucket": {"bucket": {**bucket, "name": name}, "inserted": True}}}
            elif b"mutation CreateRunFiles" in request:
                files = [{"name": name, "uploadUrl": url} for name in json.loads(request)["variables"]["files"]]
                answer = {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
            elif b"query Runs" in request:
                answer = {"data": {"project": known(json.loads(request)["variables"])}}
            elif b"viewer" in request:
                answer = {"data": {"viewer": {"id": "e", "entity": "me", "username": "me", "flags": "{}"}}}
            body = b"{}" if fault == "{}" and not first else json.dumps(answer).encode()
            faulty_server.answer(self, body, "" if first or fault == "{}" else fault, resume=resume)

        do_PUT = do_GET = do_POST  # noqa: N815  http.server calls them so

        def log_message(self, *_: object) -> None:
            pass

    def known(asked: dict) -> dict | None:
        """The answer to `query Runs`, of which W&B's own is a page: newest first, as many as asked for."""
        if asked["project"] != "gpt2-ladder":
            return None
        filters = json.loads(asked["filters"])
        job_types = filters.pop("jobType", {"$in": [run["jobType"] for run in runs]})["$in"]
        found = [run for run in runs if run.items() >= filters.items() and run["jobType"] in job_types]
        found.sort(key=lambda run: run["createdAt"], reverse=asked["order"] == "-created_at")
        start = int(asked["cursor"] or 0)
        end = start + asked["perPage"]
        edges = [{"node": run, "cursor": str(index)} for index, run in enumerate(found[start:end], start + 1)]
        pages = {"endCursor": str(end), "hasNextPage": end < len(found)}
        return {"runCount": len(found), "readOnly": False, "runs": {"edges": edges, "pageInfo": pages}}

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield url, sent
    finally:
        resume.set()
        server.shutdown()
        server.server_close()
