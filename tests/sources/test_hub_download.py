"""Download and verify a network from a hub, in a separate process because HF_ENDPOINT is read at import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from gpt2_ladder import files
from gpt2_ladder.sources import downloads, hub_format, pretrained
from gpt2_ladder.using import verification
from helpers import fake_hub
from helpers.common import REPOSITORY, random_ids
from helpers.hub_networks import hub_tensors, transformers_gpt2

FETCH = """
import json, sys
from pathlib import Path
from gpt2_ladder.config import ModelSize, Pretrained
from gpt2_ladder.sources import pretrained
from pipeline import run

pretrained.SHA256 = {"gpt2": json.loads(sys.argv[2])}
size = ModelSize(n_layer=2, n_head=2, n_embd=16, n_positions=32, learning_rate=1e-3, overfit_loss=1.0)
run(lambda: pretrained.fetch(Path(sys.argv[1]), Pretrained(source=sys.argv[3], folder=None), "gpt2", size, seed=1))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A tiny GPT-2 in the layout of the hub's file: no prefix, masks among the weights, no head."""
    folder = tmp_path_factory.mktemp("published")
    transformers_gpt2().config.save_pretrained(folder)
    save_file(hub_tensors(), folder / hub_format.WEIGHTS, metadata={"format": "pt"})
    return folder


def fetch(folder: Path, published: Path, endpoint: str, source: str) -> subprocess.CompletedProcess[str]:
    pinned = {name: files.sha256(published / name) for name in (hub_format.CONFIG, hub_format.WEIGHTS)}
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder.parent / "hf"),
    }
    command = [sys.executable, "-c", FETCH, str(folder), json.dumps(pinned), source]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_a_checkpoint_is_downloaded_and_verified(tmp_path, published):
    folder = tmp_path / "gpt2"
    with fake_hub.serve(published, pretrained.REVISIONS["gpt2"]) as (endpoint, requests):
        result = fetch(folder, published, endpoint, "openai")
    assert result.returncode == 0, result.stderr
    assert not downloads.is_stand_in(folder / "model.safetensors")
    provenance = json.loads(downloads.provenance_path(folder / hub_format.WEIGHTS).read_text())
    assert provenance["source"].startswith(f"{endpoint}/openai-community/gpt2/resolve/{pretrained.REVISIONS['gpt2']}/")
    assert any(request.startswith("GET /lfs/") for request in requests)  # followed the redirect
    assert verification.compare(folder, random_ids(), random_ids(batch=1, time=4), new_tokens=8).passed
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "config.json.provenance.json",
        "model.safetensors",
        "model.safetensors.provenance.json",
    ]
