"""A Hugging Face hub of our own: one repository, served the way the real one serves `openai-community/gpt2`."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serve(folder: Path, revision: str, corrupt: str | None = None, broken: str = "") -> Iterator[tuple[str, list[str]]]:
    """Serve the files of `folder` at `revision`; yield the endpoint and the growing list of requests.

    Weights are redirected to another path as large files are, with the headers that huggingface_hub asks for. One byte
    of the file called `corrupt` is flipped on the way. Weights are `broken` by "403", or by "cut" in the middle.
    """
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(f"{self.command} {self.path}")
            name = self.path.rsplit("/", 1)[-1]
            if f"/resolve/{revision}/" not in self.path and not self.path.startswith("/lfs/"):
                self.send_error(404)
                return
            body = bytearray((folder / name).read_bytes())
            sha256 = hashlib.sha256(body).hexdigest()
            if name == corrupt:
                body[-1] ^= 1
            if broken == "403" and name.endswith(".safetensors"):
                self.send_error(403)
                return
            is_redirect = name.endswith(".safetensors") and not self.path.startswith("/lfs/")
            self.send_response(302 if is_redirect else 200)
            self.send_header("X-Repo-Commit", revision)
            self.send_header("ETag", f'"{sha256}"')
            if is_redirect:
                self.send_header("X-Linked-Size", str(len(body)))
                self.send_header("X-Linked-Etag", f'"{sha256}"')
                self.send_header("Location", f"http://127.0.0.1:{server.server_port}/lfs/{name}")
                body.clear()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if broken == "cut" and "/lfs/" in self.path else body)

        def do_GET(self) -> None:
            self.do_HEAD()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
