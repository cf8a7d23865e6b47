"""Describe one training: what to train, and where its results go."""

import math
from dataclasses import dataclass
from pathlib import Path

from gpt2_ladder import files
from gpt2_ladder.config import Environment, Recipe, Shape, Switches
from gpt2_ladder.training import metrics


@dataclass(frozen=True)
class Job:
    """What to train, and where its results go."""

    name: str  # the level's name, "trial" or "overfit"
    job_type: str  # for W&B: "train", "trial" or "overfit"
    switches: Switches
    shape: Shape
    recipe: Recipe
    devices: int  # GPUs, or processes on a CPU, that share each batch
    folder: Path  # for steps.csv and metrics.json

    @property
    def tokens_per_step(self) -> int:
        """The number of tokens whose gradients are summed for one step."""
        return self.recipe.tokens_per_step or self.shape.batch_size * self.shape.block_size

    def micro_batches(self, micro_batch: int) -> int:
        """Return in how many parts of `micro_batch` rows each device trains its rows of one step."""
        return math.ceil(self.tokens_per_step / self.shape.block_size / self.devices / micro_batch)

    def skip(self, environment: Environment, reason: str) -> None:
        """Print and record why this job is not trained: steps.csv has no steps, metrics.json null for all numbers."""
        print(f"{self.name}: skipped. {reason}", flush=True)
        files.write(self.folder / "steps.csv", metrics.HEADER)
        about = {"status": "skipped", "reason": reason, "note": None, "environment": environment.fingerprint}
        numbers = {"devices": self.devices, **dict.fromkeys(metrics.MEASURED)}
        files.write_json(self.folder / "metrics.json", {**about, **numbers})
