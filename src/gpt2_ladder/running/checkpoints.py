"""Save the state of a training. A training that resumes from it computes the same bits as an uninterrupted one.

A checkpoint is one file, `<steps>.pt`. Checkpoints are in `checkpoints/`, not in a stage's outputs, because DVC removes
outputs before it runs the stage again.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from gpt2_ladder import files, ledger
from gpt2_ladder.config import UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.training import devices, ranks
from gpt2_ladder.training.data import Batches
from gpt2_ladder.training.metrics import Step
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
        text = json.dumps({"format": 2, **self.settings}, sort_keys=True)  # other code cannot read another format
        return FOLDER / self.name / hashlib.sha256(text.encode()).hexdigest()[:12]

    def newest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        return max(self.folder.glob("*.pt"), default=None)

    @ledger.phase("recording")
    def save(self, steps: Sequence[Step]) -> None:
        """Save the state after `steps`, then remove the previous checkpoint."""
        state = {
            "settings": self.settings,
            "steps": [astuple(step) for step in steps],
            "position": self.batches.position,
            "course": (self.course.steps, self.course.validations),
            "best": self.course.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "generator": torch.get_rng_state(),  # the CPU's; a GPU draws no random numbers, without dropout
        }
        path, older = self.folder / f"{len(steps):08}.pt", set(self.folder.glob("*"))
        with files.replacing(path) as (temporary,), temporary.open("wb") as file:
            torch.save(state, file)  # not to a path: then no error says that the disk is full
        for other in older - {path}:
            shutil.rmtree(other) if other.is_dir() else other.unlink()  # left by a killed process

    def load(self) -> list[Step]:
        """Load the newest checkpoint into model, optimizer, batches, course and torch's generator; return its steps.

        If there is no checkpoint, change nothing and return an empty list. Raise UserError if the checkpoint is
        damaged, or if the ranks see different ones.
        """
        for other in sorted({*FOLDER.glob(f"{self.name}/*")} - {self.folder}):
            print(f"{self.name}: ignoring {other}, which has other settings", flush=True)
        path = self.newest()
        if len({*ranks.gather(path and path.name)}) > 1:
            fix = "share this folder between all machines"
            raise UserError(f"{self.folder}: the ranks see different checkpoints; {fix}")
        if path is None:
            return []
        try:
            with zipfile.ZipFile(path) as archive:
                # testzip compares checksums, but torch reads nothing from a record that a flipped bit makes a folder
                folder = next((record.filename for record in archive.infolist() if record.external_attr), None)
                if damaged := archive.testzip() or folder:
                    raise ValueError(f"{damaged} is not as torch wrote it")
            saved = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
            self.batches.position = saved["position"]
            copy_weights(self.model, saved["model"])
            self.course.steps, self.course.validations = saved["course"]
            self.course.best = saved["best"]
            groups = self.optimizer.state_dict()["param_groups"]  # their settings come from params.yaml
            self.optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": groups})
            self.scaler.load_state_dict(saved["scaler"])
            torch.set_rng_state(saved["generator"])
            steps = [Step(*row) for row in saved["steps"]]
        except Exception as error:
            if devices.is_out_of_memory(error):
                raise
            reason = files.printable(" ".join(str(error).split()))[:500]
            fix = f"remove {self.folder} to train from the start"
            raise UserError(f"{path}: the checkpoint is damaged ({reason}); {fix}") from None
        print(f"{self.name}: resuming after step {steps[-1].step} from {path}", flush=True)
        return steps

    def forget(self) -> None:
        """Remove the checkpoints of a finished training."""
        shutil.rmtree(self.folder, ignore_errors=True)


@torch.no_grad()
def copy_weights(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the parameters of `model`; of vocabularies with different padding, copy the shared rows."""
    for name, parameter in model.named_parameters():
        rows = min(len(parameter), len(weights[name]))
        parameter[:rows] = weights[name][:rows]
