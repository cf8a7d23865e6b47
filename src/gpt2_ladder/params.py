"""All settings of params.yaml, and what they must have in common; params_yaml.py reads the file."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from gpt2_ladder import config
from gpt2_ladder.config import require


def _allow_sparse_rows(schema: dict[str, Any]) -> None:
    """Make all keys optional in the JSON schema of `levels`, because `defaults` has them too."""
    schema["additionalProperties"] = config.Level.model_json_schema() | {"required": []}


class Params(config.Switches):
    """All settings of params.yaml. The inherited switches are those of the trial."""

    model: config.Model
    machine: Literal["cpu", "gpu"]
    rehearsal: bool
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    deterministic: bool
    checkpoint_every: config.Count | None
    devices: config.Count
    half: Literal["bf16", "fp16", "auto"]
    run_slow_levels: bool
    data: config.Data
    pretrained: config.Pretrained
    optimizer: config.AdamW
    recipe: config.Recipe
    quality: config.Shape
    machines: dict[Literal["cpu", "gpu"], config.Shape]
    benchmark: dict[Literal["cpu", "gpu"], config.Rounds]
    trial: dict[Literal["cpu", "gpu"], config.TrialTime]
    profile: bool
    parity: config.Tolerances
    peak_tflops: dict[config.Precision, PositiveFloat | None]  # None: look up the GPU, or measure the CPU
    models: dict[config.Model, config.ModelSize]
    defaults: config.Level
    levels: Annotated[dict[config.LevelName, config.Level], Field(json_schema_extra=_allow_sparse_rows)]

    @model_validator(mode="before")
    @classmethod
    def _complete_rows(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the keys that a row of `levels` lacks from `defaults`."""
        defaults, levels = document.get("defaults"), document.get("levels")
        if not (isinstance(defaults, Mapping) and isinstance(levels, Mapping)):
            return {**document}
        full = {name: {**defaults, **(row or {})} for name, row in levels.items() if isinstance(row, Mapping | None)}
        return {**document, "levels": {**levels, **full}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        tables = {"models": "model", **dict.fromkeys(("machines", "benchmark", "trial"), "machine")}
        for table, name in tables.items():
            rows, key = getattr(self, table), getattr(self, name)
            require(key in rows, name, key, f"{table} only has {', '.join(rows) or 'no rows'}")
        recipe, rule = self.recipe, f"models only has {', '.join(self.models)}"
        require(recipe.model is None or recipe.model in self.models, "recipe.model", recipe.model, rule)
        machine, own = f"machines.{self.machine}", self.for_trial()
        shape, speed = own.shape("speed"), self.shape("speed")
        shapes = ("quality", self, self.quality), (machine, self, speed), ("recipe", own, shape)
        for name, settings, checked in shapes:
            rule = f"must be at most models.{settings.model}.n_positions ({settings.size.n_positions})"
            require(checked.block_size <= settings.size.n_positions, f"{name}.block_size", checked.block_size, rule)
            rule = f"must divide {name}.batch_size ({checked.batch_size})"
            require(name == "quality" or not checked.batch_size % self.devices, "devices", self.devices, rule)
        tokens, batch_tokens = recipe.tokens_per_step, shape.batch_size * shape.block_size
        rule = f"must be a multiple of the trial's batch_size * block_size ({batch_tokens})"
        require(not (tokens or 0) % batch_tokens, "recipe.tokens_per_step", tokens, rule)
        rule = f"must be below the trial's steps ({shape.steps})"
        require(recipe.lr_warmup_steps < shape.steps, "recipe.lr_warmup_steps", recipe.lr_warmup_steps, rule)
        rule = f"only the weights of model {self.model} are downloaded; leave recipe.model empty"
        require(recipe.start != "openai" or own.model == self.model, "recipe.start", recipe.start, rule)
        rule = "the benchmark uses this name for the baseline's second arm; rename the level"
        require(config.CONTROL not in self.levels, f"levels.{config.CONTROL}", config.CONTROL, rule)
        rule = "the trial is compared with this level; keep its row"
        require(config.BASELINE in self.levels, f"levels.{config.BASELINE}", None, rule)
        path, rule = self.data.path, f"source {self.data.source} does not read a path; set data.path: {config.CORPUS}"
        require(self.data.source in ("text", "parquet") or path == config.CORPUS, "data.path", path, rule)
        source, folder, ours = self.pretrained.source, self.pretrained.folder, not self.model.startswith("gpt2")
        rule = f"there are no weights for model {self.model}; use auto or stand-in"
        require(source != "openai" or not ours, "pretrained.source", source, rule)
        rule = "this source and model read no folder; leave it empty"
        require(folder is None or not (source == "stand-in" or ours), "pretrained.folder", folder, rule)
        return self

    @property
    def size(self) -> config.ModelSize:
        """The size of the chosen model."""
        return self.models[self.model]

    @property
    def switches(self) -> config.Switches:
        """The switches of the trial."""
        return config.Switches(**{name: getattr(self, name) for name in config.Switches.model_fields})

    @property
    def changes(self) -> dict[str, str]:
        """The trial's switches and recipe where they differ from BASELINE's, by their key in params.yaml."""
        before = self.levels[config.BASELINE].model_dump() | {f"recipe.{key}": value for key, value in config.Recipe()}
        after = self.switches.model_dump() | {f"recipe.{key}": value for key, value in self.recipe}
        return {key: str(value).lower() for key, value in after.items() if value != before[key]}

    def shape(self, group: Literal["quality", "speed"]) -> config.Shape:
        """Return the shape of the levels in `group`."""
        return self.quality if group == "quality" else self.machines[self.machine]

    def for_trial(self) -> "Params":
        """Return these settings with the trial's own size, optimizer, shape and order of the text."""
        unlimited = {"steps": config.MOST_STEPS} if self.recipe.minutes else {}  # the number that fits is not known yet
        own, name = unlimited | self.recipe.model_dump(exclude_none=True), self.recipe.model or self.model
        shape, size = self.shape("speed").with_values(own), self.models[name].with_values(own)
        tokens = shape.batch_size * shape.block_size
        rest = {"eval_tokens": max(shape.eval_tokens // tokens, 1) * tokens}
        rest["warmup_steps"] = min(shape.warmup_steps, shape.steps - 1)
        if self.recipe.block_size and not self.recipe.start:  # positions that are not trained would spoil samples
            size = size.model_copy(update={"n_positions": min(shape.block_size, size.n_positions)})
        changes = {
            "model": name,
            "optimizer": self.optimizer.with_values(own),
            "models": {**self.models, name: size},
            "machines": {**self.machines, self.machine: shape.model_copy(update=rest)},
            "data": self.data.model_copy(update={"shuffle": self.data.shuffle or self.recipe.shuffle}),
        }
        return self.model_copy(update=changes)

    def gpt(self, switches: config.Switches) -> config.GPTConfig:
        """Return the configuration of the network with the chosen size and `switches`."""
        return self.size.gpt().with_values(switches.model_dump())
