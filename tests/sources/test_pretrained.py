"""Sources of the weights; a stand-in is never taken for OpenAI's."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from gpt2_ladder import files
from gpt2_ladder.config import ModelSize, Pretrained, UserError
from gpt2_ladder.sources import downloads, hub_format, pretrained
from gpt2_ladder.training import devices
from helpers.common import random_ids

SIZE = ModelSize(n_layer=2, n_head=2, n_embd=16, n_positions=32, learning_rate=1e-3, overfit_loss=1.0)


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def point_hub_at(monkeypatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_, **__: url)


def fetch(folder, source: str = "auto", local: str | None = None, model: str = "gpt2", seed: int = 1) -> None:
    pretrained.fetch(folder, Pretrained(source=source, folder=local), model, SIZE, seed)


def test_an_unreachable_hub_gives_a_stand_in_and_a_notice(tmp_path, monkeypatch, capsys):
    point_hub_at(monkeypatch, "http://127.0.0.1:9/")
    fetch(tmp_path)
    assert downloads.is_stand_in(tmp_path / "model.safetensors")
    assert "NOT verified" in capsys.readouterr().out


def test_the_stand_in_has_the_layout_of_the_hubs_file(tmp_path):
    fetch(tmp_path, source="stand-in")
    tensors = load_file(tmp_path / hub_format.WEIGHTS)
    masks = [name for name in tensors if name.endswith(".attn.bias")]
    assert len(masks) == SIZE.n_layer
    assert len(tensors) - len(masks) == 12 * SIZE.n_layer + 4  # 148 at 12 layers
    assert "lm_head.weight" not in tensors
    assert tensors["h.0.attn.bias"].shape == (1, 1, 32, 32)
    assert hub_format.load_gpt(tmp_path)(random_ids())[0].shape == (2, 16, 50257)


@pytest.mark.parametrize("source", ["stand-in", "openai"])
def test_a_full_disk_is_reported_before_anything_is_fetched(tmp_path, monkeypatch, serve, source):
    point_hub_at(monkeypatch, serve())
    fetch(tmp_path / "a", source="stand-in")
    with (tmp_path / "a" / hub_format.WEIGHTS).open("rb") as file:
        content = (tmp_path / "a" / hub_format.WEIGHTS).stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    assert pretrained.needed(SIZE)[0] == content  # without the header
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * content - 1))
    with pytest.raises(
        UserError, match=r"take 0\.0 GB of disk; .* 1\.1 GB of memory; only 0\.0 GB are free: free more"
    ):
        fetch(tmp_path / "b", source=source)
    assert list((tmp_path / "b").iterdir()) == []


def test_too_little_memory_is_reported_before_a_stand_in_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda _: 10**6)
    with pytest.raises(UserError, match=r"the random stand-in needs 0\.0 GB of memory, 0\.0 GB are free"):
        fetch(tmp_path, source="stand-in")
    assert list(tmp_path.iterdir()) == []


def test_the_stand_in_follows_the_seed(tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        fetch(tmp_path / name, source="stand-in", seed=seed)
    first, again, other = ((tmp_path / name / hub_format.WEIGHTS).read_bytes() for name in ("first", "again", "other"))
    assert first == again != other


@pytest.mark.parametrize(("offline", "reason"), [(False, "connection refused"), (True, "HF_HUB_OFFLINE is set")])
def test_source_openai_without_a_hub_is_an_error(tmp_path, monkeypatch, offline, reason):
    point_hub_at(monkeypatch, "http://127.0.0.1:9/")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=f"the hub cannot be reached: {reason}"):
        fetch(tmp_path, source="openai")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_hub_that_refuses_is_an_error_without_a_stand_in(tmp_path, monkeypatch, serve, status):
    point_hub_at(monkeypatch, serve(status=status))
    with pytest.raises(UserError, match=f"answered {status}"):
        fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_local_folder_is_checked_like_a_download(tmp_path, monkeypatch):
    local = tmp_path / "local"
    fetch(local, source="stand-in")
    with pytest.raises(UserError, match="sha256 is"):
        fetch(tmp_path / "out", local=str(local))
    with pytest.raises(UserError, match="No such file"):
        fetch(tmp_path / "out", local=str(tmp_path / "nowhere"))
    pinned = {name: files.sha256(local / name) for name in (hub_format.CONFIG, hub_format.WEIGHTS)}
    monkeypatch.setattr(pretrained, "SHA256", {"gpt2": pinned})
    fetch(tmp_path / "out", local=str(local))
    assert not downloads.is_stand_in(tmp_path / "out" / "model.safetensors")
    point_hub_at(monkeypatch, "http://127.0.0.1:9/")
    fetch(tmp_path / "out")  # keeps correct files though the hub is unreachable
    assert not downloads.is_stand_in(tmp_path / "out" / "model.safetensors")


def test_an_unpublished_size_always_gets_a_stand_in(tmp_path, monkeypatch, serve):
    point_hub_at(monkeypatch, serve())
    fetch(tmp_path, model="tiny")
    assert downloads.is_stand_in(tmp_path / "model.safetensors")
