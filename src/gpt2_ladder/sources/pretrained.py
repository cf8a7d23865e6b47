"""GPT-2's published weights: from the Hugging Face hub, from a folder, or a random stand-in of the same format."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_ladder import files
from gpt2_ladder.config import ModelSize, Pretrained, UserError
from gpt2_ladder.model import count_bytes
from gpt2_ladder.sources import downloads, hub_download
from gpt2_ladder.sources.downloads import Unreachable
from gpt2_ladder.sources.hub_format import CONFIG, WEIGHTS
from gpt2_ladder.training import devices

# The commit of openai-community/<model> whose files are taken
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
# What is known of a model's files beforehand; of the others the first download is recorded, and the later ones checked
SHA256 = {
    "gpt2": {
        CONFIG: "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
        WEIGHTS: "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    }
}
STAND_IN_SOURCE = "stand-in: random weights drawn here"
STAND_IN_NOTICE = (
    "OpenAI's weights were NOT verified: random stand-in weights of the same format took their place. "
    "To fetch OpenAI's later: dvc repro -f download && dvc repro"
)


def fetch(folder: Path, source: Pretrained, model: str, size: ModelSize, seed: int) -> None:
    """Put config.json, model.safetensors and their provenance into `folder`, as `source` asks.

    `auto` gives a stand-in where the hub cannot be reached, and only then, or where no `model` of that name is
    published.

    Raises:
        UserError: `openai` is asked for and cannot be had, what came is not the pinned file or that of the first
            download, or the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source.source == "stand-in" or model not in REVISIONS:
        _write_stand_in(folder, size, seed)
        return
    try:
        _fetch_openai(folder, model, size, source.folder)
    except Unreachable as failure:
        if source.source == "openai":
            raise UserError(
                f"pretrained.source: openai, but the hub cannot be reached: {failure}; "
                "check the network or HF_ENDPOINT, name a local pretrained.folder, or use source: auto"
            ) from None
        print(f"the hub cannot be reached: {failure}", flush=True)
        _write_stand_in(folder, size, seed)


def fetch_repository(repository: str) -> Path:
    """Bring the two files of a public `repository`, owner/name, into huggingface_hub's cache; return the folder there.

    What is there already is taken without asking the hub. OpenAI's come at the pinned commit, and their hash is checked
    where it is known here; others at the newest.

    Raises:
        UserError: a file cannot be had, or is not the pinned one.
    """
    model = repository.removeprefix("openai-community/")
    repository, revision = (_repository(model) if model in REVISIONS else repository), REVISIONS.get(model)
    for name in (CONFIG, WEIGHTS):
        try:
            path: Any = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
            url = huggingface_hub.hf_hub_url(repository, name, revision=revision)
            if not isinstance(path, str):
                hub_download.probe(url)
                print(f"{name}: fetching from {downloads.hidden(url)}", file=sys.stderr)
                path = hub_download.fetch(repository, name, revision, "name a local folder")
        except HFValidationError:
            raise UserError(f"{repository!r:.100}: a repository of the hub is called owner/name") from None
        except Unreachable as failure:
            raise UserError(
                f"{repository}: the hub cannot be reached: {failure}; check the network or HF_ENDPOINT"
            ) from None
        revision = Path(path).parent.name  # the commit, from which the second file comes too
        if sha256 := SHA256.get(model, {}).get(name):
            files.check_sha256(Path(path), sha256, downloads.hidden(url), f"delete {path} and get it again")
    return Path(path).parent


def is_stand_in(folder: Path) -> bool:
    """Tell from the provenance in `folder` whether its weights are a stand-in rather than OpenAI's."""
    return bool(json.loads(downloads.provenance_path(folder / WEIGHTS).read_text())["source"] == STAND_IN_SOURCE)


def needed(size: ModelSize) -> tuple[int, int]:
    """Return the bytes of disk that weights of `size` take, and the bytes of memory that verifying them takes.

    Two networks are in memory then, and some copies of the logits of 1,024 tokens, 0.2 GB each.
    """
    disk = count_bytes(size.gpt()) + 3 * size.n_layer * size.n_positions**2  # its masks are float32, ours are bool
    return disk, 2 * disk + 2**30


def _check_disk(folder: Path, size: ModelSize) -> None:
    """Say what weights of `size` take; raise UserError where the disk has no room for them."""
    (disk, memory), free = needed(size), shutil.disk_usage(folder).free
    need = f"{disk / 1e9:.1f} GB of disk, and the verify stage as much again and {memory / 1e9:.1f} GB of memory"
    print(f"{folder}: the weights take {need}", flush=True)
    if free < 2 * disk:
        raise UserError(
            f"{folder}: the weights take {need}; {free / 1e9:.1f} GB are free: make room, or a smaller model"
        )


def _known_hashes(folder: Path, model: str, commit: str) -> dict[str, str]:
    """Return the files' SHA-256: pinned here, or that of the first download of `commit` into `folder`; empty before."""
    hashes = dict.fromkeys((CONFIG, WEIGHTS), "")
    for name in hashes:
        path = downloads.provenance_path(folder / name)
        if path.exists() and (recorded := files.read_json(path)).get("note") == commit:
            hashes[name] = recorded["sha256"]
    return hashes | SHA256.get(model, {})


def _fetch_openai(folder: Path, model: str, size: ModelSize, local: str | None) -> None:
    """Bring the two files, both checked before either replaces what is there; keep them if they are there."""
    commit = f"{_repository(model)}@{REVISIONS[model]}"
    hashes = _known_hashes(folder, model, commit)
    if all((folder / name).exists() and files.sha256(folder / name) == hashes[name] for name in hashes):
        print(f"{folder}: OpenAI's weights are already here")
        for name, sha256 in SHA256.get(model, {}).items():
            if not downloads.provenance_path(folder / name).exists():
                downloads.write_provenance(folder / name, "found in place", sha256, commit)
        return
    if local is None:
        hub_download.probe(_url(model, CONFIG))
    _check_disk(folder, size)
    with tempfile.TemporaryDirectory(dir=folder, prefix=downloads.UNFINISHED) as temporary:
        sources = {}
        for name, sha256 in hashes.items():
            path = Path(temporary) / name
            if local is None:
                sources[name] = downloads.hidden(_url(model, name))
                print(f"{name}: fetching from {sources[name]}", flush=True)
                mend = "name a local pretrained.folder"
                hub_download.fetch(_repository(model), name, REVISIONS[model], mend, Path(temporary))
            else:
                sources[name] = f"{local}/{name}"
                try:
                    shutil.copyfile(Path(local) / name, path)
                except OSError as error:
                    raise UserError(f"pretrained.folder: {error}") from None
            if not sha256:
                hashes[name] = files.sha256(path)
                print(f"{name}: its sha256 {hashes[name]} is recorded, and later downloads must have it", flush=True)
                continue
            mend = "get it again"
            if model not in SHA256:
                mend += f", or delete {downloads.provenance_path(folder / name)}, which tells the first download's"
            files.check_sha256(path, sha256, sources[name], mend)
        for name, sha256 in hashes.items():
            downloads.place(Path(temporary) / name, folder / name, sources[name], sha256, commit)


def _repository(model: str) -> str:
    return f"openai-community/{model}"


def _url(model: str, name: str) -> str:
    return huggingface_hub.hf_hub_url(_repository(model), name, revision=REVISIONS[model])


def _write_stand_in(folder: Path, size: ModelSize, seed: int) -> None:
    """Write transformers' own GPT-2, seeded, just as the hub's file is: no prefix, with masks, without lm_head."""
    _check_disk(folder, size)
    devices.check_memory(torch.device("cpu"), needed(size)[0], f"{folder}: the random stand-in")
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=size.n_layer, n_head=size.n_head, n_embd=size.n_embd, n_positions=size.n_positions)
    state = GPT2LMHeadModel(config).state_dict()
    tensors = {
        name.removeprefix("transformer."): tensor.contiguous()
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }
    for layer in range(size.n_layer):
        mask = torch.ones(size.n_positions, size.n_positions).tril()
        tensors[f"h.{layer}.attn.bias"] = mask.view(1, 1, size.n_positions, size.n_positions)
    with tempfile.TemporaryDirectory(dir=folder, prefix=downloads.UNFINISHED) as temporary:
        save_file(tensors, Path(temporary) / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(temporary)
        for name in (CONFIG, WEIGHTS):
            drawn = Path(temporary) / name
            downloads.place(drawn, folder / name, STAND_IN_SOURCE, files.sha256(drawn), STAND_IN_NOTICE)
    print(STAND_IN_NOTICE, flush=True)
