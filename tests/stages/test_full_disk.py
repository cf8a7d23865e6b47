"""A disk of 256 KiB runs full: one line reports it, previous files stay, and no partial file is left."""

import contextlib
import random
import shutil
import subprocess
from pathlib import Path

import altair as alt
import numpy as np
import pytest
import torch

from gpt2_ladder.files import write_json
from gpt2_ladder.model import GPT
from gpt2_ladder.reporting import charts
from gpt2_ladder.running.checkpoints import Checkpoints, Course
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import data
from gpt2_ladder.training.metrics import Step
from helpers.common import REPOSITORY, link_encoding, put_corpus, tiny
from pipeline import TRAIN_SHARD, VAL_SHARD, run, tokenize_corpus

KIB = 1024
FULL = r"^error: the disk is full \(0\.0 GiB free in {}\): .*; free some space there and run `dvc repro` again$"


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """The working directory: a file system of 256 KiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a small file system cannot be mounted here: there is no mount command")
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    with monkeypatch.context() as inside:
        inside.chdir(tmp_path)
        yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "filler"}


def fill(folder: Path, but: int = 0) -> None:
    """Fill the disk, except `but` bytes."""
    with (folder / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * KIB)
        file.truncate(file.tell() - but)


def test_the_previous_shards_stay_when_tokenizing_fills_the_disk(small_disk, monkeypatch, bpe_files):
    shutil.copy(REPOSITORY / "params.yaml", small_disk)
    link_encoding(bpe_files)
    put_corpus(monkeypatch, b"a good text, " * 100)
    run(tokenize_corpus.main)
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=120 * KIB)  # 2 bytes a token of 1.7 letters
    put_corpus(monkeypatch, "".join(letters).encode())
    before = contents(small_disk)
    with pytest.raises(SystemExit, match=FULL.format("data")):
        run(tokenize_corpus.main)
    assert contents(small_disk) == before
    assert {TRAIN_SHARD.name, VAL_SHARD.name} < {path.name for path in before}
    assert not list(small_disk.rglob(".writing-*"))


def save_checkpoint(path: Path, size: int) -> None:
    model, batches = GPT(tiny(n_embd=16 * size)), data.Batches(np.arange(9, dtype="<u2"), 1, 4)
    in_folder = type("InFolder", (Checkpoints,), {"folder": path.parent})
    checkpoints = in_folder("training", {}, model, torch.optim.AdamW(model.parameters()), batches, 1, Course(1))
    checkpoints.save([Step(0, 4.6, 1.0, 1.0, 1.0, 2, 1.0)])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("00000001.pt", save_checkpoint),
        ("model.safetensors", lambda path, size: hub_format.save_gpt(GPT(tiny(n_embd=16 * size)), path.parent)),
        ("gains.json", lambda path, size: write_json(path, {"rounds": [0] * 100 * size})),
        ("ladder.png", lambda path, size: charts.save_png(alt.Chart(title="x" * size).mark_point(), path)),
    ],
)
@pytest.mark.parametrize("left", [0, 8 * KIB])
def test_the_previous_result_stays_when_a_new_one_does_not_fit(small_disk, monkeypatch, name, write, left):
    folder = small_disk / "results"
    write(folder / name, 1)
    before = contents(small_disk)
    fill(small_disk, but=left)
    with monkeypatch.context() as inside:
        inside.chdir("/")  # another disk, which has room
        with pytest.raises(SystemExit, match=FULL.format(folder)):
            run(lambda: write(folder / name, 30))
    assert contents(small_disk) == before
    assert not list(small_disk.rglob(".writing-*"))
