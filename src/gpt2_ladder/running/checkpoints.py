"""Save the state of a training. A training that resumes from it computes the same bits as an uninterrupted one.

A checkpoint is two files. `<steps>.safetensors` has the weights, the optimizer's state, the random generator's state
and the steps. `<steps>.json` has the settings, the position in the data, the state of the loss scaler and the SHA-256
of the other file. It is written last: if it exists, the other file is complete. Checkpoints are in `checkpoints/`, not
in a stage's outputs, because DVC removes outputs before it runs the stage again.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp import GradScaler

from gpt2_ladder import files, ledger
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.training import ranks
from gpt2_ladder.training.data import Batches
from gpt2_ladder.training.metrics import STEP_FIELDS, Step
from gpt2_ladder.training.runtime import NO_SCALER

FOLDER = Path("checkpoints")


@dataclass
class Course:
    """What a training finds out while it runs."""

    steps: int | None  # its number of steps; None: not known yet
    skipped: int = 0  # steps until now that left the weights unchanged
    signals: list[str] = field(default_factory=list)  # that some rank has caught
    settled: int = 0  # after this number of steps, the next one waits until the weights have been used
    validations: dict[int, float] = field(default_factory=dict)  # the loss in nats after a number of steps
    best: dict[str, Tensor] = field(default_factory=dict)  # the weights with the smallest of these losses, on the CPU

    def validated(self, step: int, loss: float, model: GPT) -> None:
        """Note the `loss` of `model` after `step` steps; copy its weights if the loss is the smallest."""
        self.validations[step] = loss
        if loss == min(self.validations.values()):
            self.best = {name: weight.detach().cpu().clone() for name, weight in model.named_parameters()}


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training with fixed settings."""

    name: str  # the training's name
    settings: Mapping[str, Any]  # all that the result depends on; checkpoints with other settings are ignored
    model: GPT
    optimizer: torch.optim.Optimizer
    batches: Batches
    every: int  # a checkpoint is saved every `every` steps
    course: Course
    scaler: GradScaler = NO_SCALER

    @property
    def folder(self) -> Path:
        """The folder of these checkpoints."""
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
        return FOLDER / self.name / key

    def newest(self) -> Path | None:
        """Return the JSON file of the newest checkpoint, or None."""
        return max(self.folder.glob("*.json"), default=None)

    @ledger.phase("recording")
    def save(self, steps: Sequence[Step]) -> None:
        """Save the state after `steps`, then remove the previous checkpoint."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.course.best.items()}
        tensors["generator"] = torch.get_rng_state()  # the CPU's; a GPU draws no random numbers, without dropout
        # float64 holds every field of a Step exactly
        tensors["steps"] = torch.tensor([astuple(step) for step in steps], dtype=torch.float64)  # (steps, fields)
        weights, state_file = (self.folder / f"{len(steps):08}.{suffix}" for suffix in ("safetensors", "json"))
        older = set(self.folder.glob("*"))
        with files.replacing(weights, state_file) as (new_weights, new_state):
            save_file(tensors, new_weights)
            rest = {"position": self.batches.position, "scaler": self.scaler.state_dict(), "settings": self.settings}
            course = {"steps": self.course.steps, "validations": self.course.validations}
            new_state.write_text(json.dumps({"sha256": files.sha256(new_weights), **course, **rest}, indent=2) + "\n")
        for path in older - {weights, state_file}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # left by a killed process

    def load(self) -> list[Step]:
        """Load the newest checkpoint into model, optimizer, batches, course and torch's generator; return its steps.

        If there is no checkpoint, change nothing and return an empty list. Raise UserError if the checkpoint is
        damaged, or if the ranks see different ones.
        """
        for other in sorted({*FOLDER.glob(f"{self.name}/*")} - {self.folder}):
            print(f"{self.name}: ignoring {other}, which has other settings", flush=True)
        state = self.newest()
        if len({*ranks.gather(state and state.name)}) > 1:
            fix = "share this folder between all machines"
            raise UserError(f"{self.folder}: the ranks see different checkpoints; {fix}")
        if state is None:
            return []
        path = state.with_suffix(".safetensors")
        try:
            saved = files.read_json(state)
            if files.sha256(path) != saved.get("sha256"):
                raise ValueError("the file's sha256 differs from the one in its .json")
            self.batches.position = saved["position"]
            tensors = load_file(path)
            copy_weights(self.model, {name: tensors[f"model.{name}"] for name, _ in self.model.named_parameters()})
            self.course.steps = saved["steps"]
            self.course.validations = {int(step): loss for step, loss in saved["validations"].items()}
            self.course.best = {name[5:]: tensor.clone() for name, tensor in tensors.items() if name[:5] == "best."}
            groups = self.optimizer.state_dict()["param_groups"]  # their settings come from params.yaml
            self.optimizer.load_state_dict({"state": _optimizer_state(tensors), "param_groups": groups})
            self.scaler.load_state_dict(saved.get("scaler", {}))
            torch.set_rng_state(tensors["generator"])
            rows = [dict(zip(STEP_FIELDS, row, strict=True)) for row in tensors["steps"].tolist()]
            steps = TypeAdapter(list[Step]).validate_python(rows)  # turns 3.0 into an int where Step has one
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
            reason = files.printable(" ".join(str(error).split()))[:500]
            fix = f"remove {self.folder} to train from the start"
            raise UserError(f"{path}: the checkpoint is damaged ({reason}); {fix}") from None
        print(f"{self.name}: resuming after step {steps[-1].step} from {state}", flush=True)
        return steps

    def forget(self) -> None:
        """Remove the checkpoints of a finished training, the JSON files first: each marks a complete checkpoint."""
        for state in sorted(self.folder.glob("*.json")):
            state.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)


@torch.no_grad()
def copy_weights(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the parameters of `model`; of vocabularies with different padding, copy the shared rows."""
    for name, parameter in model.named_parameters():
        rows = min(len(parameter), len(weights[name]))
        parameter[:rows] = weights[name][:rows]


def _optimizer_state(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor.clone()  # a copy: the next save removes the file
    return state
