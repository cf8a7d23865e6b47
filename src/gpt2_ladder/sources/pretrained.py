"""Get GPT-2's published weights from the Hugging Face hub or a folder, or write random stand-in weights."""

import shutil
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
from gpt2_ladder.sources.hub_format import CONFIG, WEIGHTS
from gpt2_ladder.training import devices

OPENAI = "openai-community"
REVISIONS = {  # the commits to download from
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
SHA256 = {  # of other models, the first download records the hashes, and later downloads must match
    "gpt2": {
        CONFIG: "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
        WEIGHTS: "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    }
}
STAND_IN_NOTICE = (
    "OpenAI's weights were NOT verified: random stand-in weights of the same format took their place. "
    "To fetch OpenAI's later: dvc repro -f download && dvc repro"
)


def fetch(folder: Path, source: Pretrained, model: str, size: ModelSize, seed: int) -> None:
    """Write config.json, model.safetensors and their provenance to `folder`, as `source` selects.

    `auto` writes a stand-in if the hub is unreachable or has no such `model`. Raise UserError if the source is `openai`
    and the hub is unreachable, if a file does not have its pinned hash, or if the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source.source != "stand-in" and model in REVISIONS:
        try:
            _fetch_openai(folder, model, size, source.folder)
            return
        except hub_download.HubUnreachable as failure:
            if source.source == "openai":
                raise
            print(f"{failure}; writing random weights instead", flush=True)
    _write_stand_in(folder, size, seed)


def fetch_repository(repository: str) -> Path:
    """Download the two files of a public `repository` (owner/name) to the hub's cache and return their folder.

    Use cached files without a request. Download OpenAI's models from their pinned commits, and other models from the
    latest commit. Raise UserError if a file cannot be downloaded, or if its hash is pinned and differs.
    """
    model = repository.removeprefix(f"{OPENAI}/")
    repository, revision = f"{OPENAI}/{model}" if model in REVISIONS else repository, REVISIONS.get(model)
    for name in (CONFIG, WEIGHTS):
        try:
            path: Any = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
            if not isinstance(path, str):
                path = hub_download.fetch(repository, name, revision, "use a local folder")
        except HFValidationError:
            raise UserError(f"{repository!r:.100}: not a repository name; write it as owner/name") from None
        revision = Path(path).parent.name  # the commit; the second file must come from the same one
        if sha256 := SHA256.get(model, {}).get(name):
            files.check_sha256(Path(path), sha256, fix=f"delete {path} and fetch it again")
    return Path(path).parent


def needed(size: ModelSize) -> tuple[int, int]:
    """Return the bytes of disk that weights of `size` need, and the bytes of memory to verify them."""
    disk = count_bytes(size.gpt()) + 3 * size.n_layer * size.n_positions**2  # the file's masks are float32, ours bool
    return disk, 2 * disk + 2**30  # memory for two networks and their logits


def _check_disk(folder: Path, size: ModelSize) -> None:
    """Print the disk and memory that weights of `size` need; raise UserError if the disk is too small."""
    (disk, memory), free = needed(size), shutil.disk_usage(folder).free
    more = f"the verify stage needs as much again and {memory / 1e9:.1f} GB of memory"
    need = f"{folder}: the weights take {disk / 1e9:.1f} GB of disk; {more}"
    print(need, flush=True)
    if free < 2 * disk:
        raise UserError(f"{need}; only {free / 1e9:.1f} GB are free: free more, or set a smaller model")


def _fetch_openai(folder: Path, model: str, size: ModelSize, local: str | None) -> None:
    """Fetch both files from the hub or a `local` folder, check both, and then replace the old files."""
    repository, revision = f"{OPENAI}/{model}", REVISIONS[model]
    commit, hashes = f"{repository}@{revision}", {CONFIG: "", WEIGHTS: ""}  # empty before the first download
    records = {name: downloads.provenance_path(folder / name) for name in hashes}
    for name, record in records.items():
        if record.exists() and (written := files.read_json(record)).get("note") == commit:
            hashes[name] = written["sha256"]
    hashes |= SHA256.get(model, {})
    if all((folder / name).exists() and files.sha256(folder / name) == hashes[name] for name in hashes):
        print(f"{folder}: OpenAI's weights are already here")
        for name, sha256 in hashes.items():
            if not records[name].exists():
                downloads.write_provenance(folder / name, "found in place", sha256, commit)
        return
    urls = {name: huggingface_hub.hf_hub_url(repository, name, revision=revision) for name in hashes}
    sources = {name: f"{local}/{name}" if local else downloads.mask_passwords(url) for name, url in urls.items()}
    _check_disk(folder, size)
    with tempfile.TemporaryDirectory(dir=folder, prefix=downloads.UNFINISHED) as temporary:
        paths = {name: Path(temporary) / name for name in hashes}
        for name, sha256 in hashes.items():
            if local is None:
                fix = "set pretrained.folder to a local copy, or pretrained.source: auto"
                hub_download.fetch(repository, name, revision, fix, Path(temporary))
            else:
                try:
                    shutil.copyfile(sources[name], paths[name])
                except OSError as error:
                    raise UserError(f"pretrained.folder: {error}; name a folder with both files") from None
            if not sha256:
                hashes[name] = files.sha256(paths[name])
                print(f"{name}: recorded its sha256 {hashes[name]}; later downloads must match it", flush=True)
                continue
            fix = "" if model in SHA256 else f", or delete {records[name]} to accept this file"
            files.check_sha256(paths[name], sha256, sources[name], f"fetch it again{fix}")
        for name, sha256 in hashes.items():
            downloads.replace(folder / name, paths[name], sources[name], sha256, commit)


def _write_stand_in(folder: Path, size: ModelSize, seed: int) -> None:
    """Write a random GPT-2 from transformers like OpenAI's file: no prefix, with masks, without lm_head."""
    _check_disk(folder, size)
    devices.check_memory(torch.device("cpu"), needed(size)[0], f"{folder}: the random stand-in")
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=size.n_layer, n_head=size.n_head, n_embd=size.n_embd, n_positions=size.n_positions)
    state = GPT2LMHeadModel(config).state_dict()
    del state["lm_head.weight"]
    tensors = {name.removeprefix("transformer."): tensor.contiguous() for name, tensor in state.items()}
    mask = torch.ones(1, 1, size.n_positions, size.n_positions).tril()
    tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(size.n_layer)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=downloads.UNFINISHED) as temporary:
        save_file(tensors, Path(temporary) / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(temporary)
        for name in (CONFIG, WEIGHTS):
            path = Path(temporary) / name
            downloads.replace(folder / name, path, downloads.STAND_IN, files.sha256(path), STAND_IN_NOTICE)
    print(STAND_IN_NOTICE, flush=True)
