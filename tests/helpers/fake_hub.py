"""A Hugging Face hub on 127.0.0.1 with one repository, which answers as the real one does."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from helpers import faulty_server

WEIGHTS_THEMSELVES = "GET /lfs/"


@contextmanager
def serve(
    folder: Path,
    revision: str,
    faults: Iterable[str] = (),
    at: str = WEIGHTS_THEMSELVES,
    headers: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of `folder` at `revision`; yield the endpoint and the growing list of requests.

    Weights are redirected to another path, as the hub does for large files, with the headers that huggingface_hub
    needs. Requests that contain `at` ("GET /path") fail with the next of `faults` and get the `headers`.
    """
    requests: list[str] = []
    turns, resume = iter(faults), threading.Event()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        request = f"{handler.command} {handler.path}"
        requests.append(request)
        name = handler.path.rsplit("/", 1)[-1]
        if f"/resolve/{revision}/" not in handler.path and not handler.path.startswith("/lfs/"):
            handler.send_error(404)
            return
        body, status = (folder / name).read_bytes(), 200
        sha256 = hashlib.sha256(body).hexdigest()
        sent = {"X-Repo-Commit": revision, "ETag": f'"{sha256}"'}
        if name.endswith(".safetensors") and not handler.path.startswith("/lfs/"):
            sent |= {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{sha256}"'}
            sent |= {"Location": f"{endpoint}/lfs/{name}"}
            body, status = b"", 302
        fault = ""
        if at in request:
            fault, sent = next(turns, ""), sent | dict(headers or {})
        faulty_server.answer(handler, body, fault, status, sent, resume)

    with faulty_server.running(reply) as endpoint:
        try:
            yield endpoint, requests
        finally:
            resume.set()
