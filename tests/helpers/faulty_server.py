"""A server on 127.0.0.1 whose responses fail in chosen ways."""

import http.server
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

PASSING = ["reset", "reset halfway", "hang", "hang halfway", "cut", "long", "short", "flip", "429", "500", "502", "503"]


@contextmanager
def running(reply: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Serve every GET and HEAD with `reply` on a port of 127.0.0.1; yield the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reply(self)

        do_HEAD = do_GET  # noqa: N815  the name that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def answer(
    handler: http.server.BaseHTTPRequestHandler,
    body: bytes,
    fault: str = "",
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    resume: threading.Event | None = None,
) -> None:
    """Send `body`, or only a status, or fail as `fault` says; hanging responses continue when `resume` is set."""
    resume = resume or threading.Event()
    if fault.isdecimal():
        status, body = int(fault), b""
    if fault == "hang":
        resume.wait()
        return
    if fault == "reset":
        reset(handler)
        return
    if fault == "flip":
        body = bytes([body[0] ^ 1]) + body[1:]
    lengths = {"long": len(body) + 9, "short": len(body) // 2}
    handler.send_response(status)
    for name, value in ({"Content-Length": str(lengths.get(fault, len(body)))} | dict(headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "HEAD":
        return
    half = len(body) // 2 if fault == "cut" or "halfway" in fault else len(body)
    handler.wfile.write(body[:half])
    if fault == "hang halfway":
        resume.wait()
        handler.wfile.write(body[half:])
    if fault == "reset halfway":
        reset(handler)


def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    """End the connection with RST instead of FIN."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())
