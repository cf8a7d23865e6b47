"""A W&B server that lets a run start and then goes wrong, or never comes to that; and what a training makes of it."""

import csv
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import faulty_server
import pytest
import wandb
from conftest import REPOSITORY

from gpt2_ladder import tracking

KEY = "5ec2e7" * 7
STEPS = 200

TRAINS = """
import sys
from pathlib import Path
from gpt2_ladder import tracking
from gpt2_ladder.config import Params
from pipeline.train import train

tracking.FINISH_TIMEOUT_S = 1
params = Params.model_validate_json(sys.argv[1])
train(params, "trial", "trial", params.switches, "speed", Path(sys.argv[2]))
"""


@contextmanager
def serve(fault: str, starts: bool) -> Iterator[tuple[str, list[bytes]]]:
    """Serve what W&B's client needs; yield the address and the growing list of what it sends.

    All requests meet `fault`, but the one with which a run `starts`. "{}" is an answer that lacks all that was asked.
    """
    sent: list[bytes] = []
    turn, resume = threading.Lock(), threading.Event()
    url = "http://127.0.0.1"
    project = {"id": "p", "name": "gpt2-ladder", "entity": {"id": "e", "name": "me"}}
    bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": project, "historyLineCount": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = self.rfile.read(int(self.headers["Content-Length"]))
            with turn:
                first = starts and not any(b"mutation UpsertBucket" in one for one in sent)
                sent.append(request)
            answer: dict = {}
            if b"mutation UpsertBucket" in request and (first or not fault):
                answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            elif b"mutation CreateRunFiles" in request:
                files = [{"name": name, "uploadUrl": url} for name in json.loads(request)["variables"]["files"]]
                answer = {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
            body = b"{}" if fault == "{}" and not first else json.dumps(answer).encode()
            faulty_server.answer(self, body, "" if first or fault == "{}" else fault, resume=resume)

        do_PUT = do_GET = do_POST  # noqa: N815

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


def variables(url: str, folder: Path) -> dict[str, str]:
    """The environment of a user of the server at `url`."""
    own = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "WANDB_DIR": str(folder), "NETRC": str(folder / "netrc")}
    # W&B's process holds the end up for ten seconds to report that it cannot report errors
    return own | {"WANDB_MODE": "online", "WANDB_ERROR_REPORTING": "false"}


def test_a_server_that_fails_while_a_training_goes_on_costs_no_row_and_does_not_hold_it_up(params, tmp_path):
    document = params.model_dump() | {"checkpoint_every": None}
    document["machines"]["cpu"]["steps"] = STEPS
    started, sent = {}, {}
    with ExitStack() as servers:
        for fault in ("", "500", "reset", "hang", "{}"):
            url, sent[fault] = servers.enter_context(serve(fault, starts=True))
            environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}"} | variables(url, tmp_path)
            command = [sys.executable, "-c", TRAINS, json.dumps(document), f"results/{fault or 'none'}"]
            started[fault] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for fault, process in started.items():
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, fault
            assert f"W&B: {url.rsplit(':', 1)[0]}" in output, fault  # it did start online
            folder = Path(f"results/{fault or 'none'}")
            rows = list(csv.DictReader((folder / "steps.csv").read_text().splitlines()))
            assert [int(row["step"]) for row in rows] == list(range(STEPS)), fault
            assert json.loads((folder / "metrics.json").read_text())["loss_last"] == float(rows[-1]["loss"])
            assert len(sent[fault]) > 1, fault  # and was refused later
    got = b"".join(sent[""])
    assert all(f'\\"_step\\":{step}'.encode() in got for step in range(STEPS))  # a server that works gets every row
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("fault", ["401", "500", "reset", "hang"])
def test_a_server_that_fails_from_the_start_leaves_an_offline_run(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 1)
    with serve(fault, starts=False) as (url, sent):
        for name, value in variables(url, tmp_path).items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # W&B reads the environment once a process
        run = tracking.start_run("bf16", "train", ["cpu"], {}, "group")
        run.finish()
        wandb.teardown()
    assert run.offline
    assert sent
    output = capsys.readouterr().out
    assert output.count("W&B cannot be reached or refuses") == 1
    assert KEY not in output
    assert list(tmp_path.glob("wandb/offline-run-*"))
