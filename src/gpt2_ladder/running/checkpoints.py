"""A training's state on the disk, from which it goes on bit for bit as if nothing had interrupted it.

A checkpoint is two files: `<steps>.safetensors` holds weights, optimizer, generator and the steps so far,
`<steps>.json` what they belong to and the batches' position. The second takes its place last, so where it is, the first
is whole; only then is the checkpoint before removed. DVC knows nothing of them: they lie in `checkpoints/`, not among a
stage's outputs, which it removes before it runs the stage again.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.files import printable
from gpt2_ladder.model import GPT
from gpt2_ladder.training import ranks
from gpt2_ladder.training.data import Batches
from gpt2_ladder.training.metrics import STEP_FIELDS, Step

FOLDER = Path("checkpoints")


@dataclass(frozen=True)
class Checkpoints:
    """Those of one training; of all trainings with the same name and other settings, another object's.

    Attributes:
        name: of the training.
        settings: everything that decides its result, as JSON; a checkpoint of other settings is left alone.
        model: what it trains.
        optimizer: of `model`.
        batches: what it trains on.
        every: how many steps lie between two of them.
    """

    name: str
    settings: Mapping[str, Any]
    model: GPT
    optimizer: torch.optim.Optimizer
    batches: Batches
    every: int

    @property
    def folder(self) -> Path:
        """Where they lie."""
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
        return FOLDER / self.name / key

    def newest(self) -> Path | None:
        """Return the JSON file of the newest one, None where there is none."""
        return max(self.folder.glob("*.json"), default=None)

    def save(self, steps: Sequence[Step]) -> None:
        """Write everything that the training needs to go on after `steps`, then remove the checkpoint before."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        tensors["generator"] = torch.get_rng_state()  # the CPU's: nothing is drawn on a GPU, there is no dropout
        # float64 holds every field of a Step exactly
        tensors["steps"] = torch.tensor([astuple(step) for step in steps], dtype=torch.float64)  # (steps, fields)
        weights, state_file = (self.folder / f"{len(steps):08}.{suffix}" for suffix in ("safetensors", "json"))
        older = set(self.folder.glob("*"))
        with files.replacing(weights, state_file) as (new_weights, new_state):
            save_file(tensors, new_weights)
            position = self.batches.position
            state = {"sha256": files.sha256(new_weights), "position": position, "settings": self.settings}
            new_state.write_text(json.dumps(state, indent=2) + "\n")
        for path in older - {weights, state_file}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # a folder: a killed process was writing into it

    def load(self) -> list[Step]:
        """Bring model, optimizer, batches and torch's generator to where the newest checkpoint left them.

        Returns:
            The steps taken until then; none where there is no checkpoint.

        Raises:
            UserError: the checkpoint is damaged, or not the same for every rank.
        """
        for other in sorted({*FOLDER.glob(f"{self.name}/*")} - {self.folder}):
            print(f"{self.name}: {other} belongs to other settings and is left alone", flush=True)
        state = self.newest()
        if len({*ranks.gather(state and state.name)}) > 1:
            raise UserError(
                f"{self.folder}: not every rank sees the same checkpoint; let all machines share the folder"
            )
        if state is None:
            return []
        path = state.with_suffix(".safetensors")
        try:
            written = files.read_json(state)
            if files.sha256(path) != written.get("sha256"):
                raise ValueError("its sha256 is not the one that was written down")
            self.batches.position = written["position"]
            tensors = load_file(path)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(tensors[f"model.{name}"])
            groups = self.optimizer.state_dict()["param_groups"]  # their settings come from params.yaml
            self.optimizer.load_state_dict({"state": _optimizer_state(tensors), "param_groups": groups})
            torch.set_rng_state(tensors["generator"])
            steps = [_step(row) for row in tensors["steps"].tolist()]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = printable(" ".join(str(error).split()))[:500]
            mend = f"remove {self.folder} to train from the start"
            raise UserError(f"{path}: a damaged checkpoint ({reason}); {mend}") from None
        print(f"{self.name}: goes on after step {steps[-1].step}, from {state}", flush=True)
        return steps

    def forget(self) -> None:
        """Remove them, the training having ended well; the newest .json last of all, while all of it is there."""
        for state in sorted(self.folder.glob("*.json")):
            state.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


def _step(row: Sequence[float]) -> Step:
    values: dict[str, Any] = dict(zip(STEP_FIELDS, row, strict=True))
    return Step(**(values | {name: int(values[name]) for name in ("step", "micro_batch")}))


def _optimizer_state(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor.clone()  # out of the file, which the next save removes
    return state
