"""Define and validate all settings of params.yaml with pydantic; params_yaml.py reads the file.

Every stage imports this module first, so it does not import torch, which takes seconds.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

GPT2_VOCAB_SIZE = 50257  # 50,000 merges + 256 bytes + <|endoftext|>
CORPUS = "data/input.txt"  # tiny Shakespeare
CONTROL = "control"  # the benchmark's second arm of the baseline
BASELINE = "fp32"  # the level that the trial is compared with
MOST_STEPS = 2**31
MINIMUM_ROUNDS = 6  # one in 16 times, the median is below or above all of 5 values: too often for a 95 % interval

Model = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "small", "tiny"]
Count = Annotated[int, Field(gt=0, lt=2**63)]
Tokens = Annotated[int, Field(gt=1, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
LevelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class UserError(ValueError):
    """An error the user can fix. Stages print it as one line, without a traceback, and exit with 1."""


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError unless `condition` is true. params_yaml.py adds the line of `key` to the message."""
    if not condition:
        raise ValueError(f"{key} = {value}: {rule}")


class Strict(BaseModel):
    """Base class of all settings: no type conversion, no change after loading, no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Switches(Strict):
    """The switches of the ladder. The last two are not in Karpathy's video."""

    tie_weights: bool
    init: Literal["pytorch", "gpt2"]
    precision: Literal["fp32", "tf32", "bf16"]
    compile: bool
    attention: Literal["eager", "flash"]
    vocab_size: Annotated[int, Field(ge=GPT2_VOCAB_SIZE)]
    fused_adamw: bool
    chunked_loss: bool
    allocator: Literal["system", "caching"]


class Level(Switches):
    """One row of `levels`. Quality levels train with the shape `quality`, speed levels with a shape of `machines`."""

    group: Literal["quality", "speed"]


class Shape(Strict):
    """The shape of a training: `steps` steps on (batch_size, block_size) tokens, the first `warmup_steps` untimed."""

    batch_size: Count
    block_size: Tokens
    steps: Count
    warmup_steps: Annotated[int, Field(ge=0)]
    eval_tokens: Tokens

    @model_validator(mode="after")
    def _check(self) -> Self:
        warmup = self.warmup_steps
        _require(warmup < self.steps, "warmup_steps", warmup, f"must be below steps ({self.steps})")
        multiple = not self.eval_tokens % (self.batch_size * self.block_size)
        _require(multiple, "eval_tokens", self.eval_tokens, "must be a multiple of batch_size * block_size")
        return self


class Size(Strict):
    """The size of a GPT-2, in the names of its Hugging Face config."""

    n_layer: Annotated[int, Field(gt=0, le=1000)]
    n_head: Count
    n_embd: Count
    n_positions: Tokens

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(not self.n_embd % self.n_head, "n_embd", self.n_embd, f"must be a multiple of n_head ({self.n_head})")
        return self


class GPTConfig(Size):
    """The arguments of `GPT`; the defaults are OpenAI's choices."""

    vocab_size: Count = GPT2_VOCAB_SIZE
    tie_weights: bool = True
    init: Literal["pytorch", "gpt2"] = "gpt2"
    attention: Literal["eager", "flash"] = "eager"
    chunked_loss: bool = False
    activation_checkpointing: bool = False


class ModelSize(Size):
    """One row of `models`: a size of the network and its training settings."""

    learning_rate: PositiveFloat
    overfit_loss: PositiveFloat
    activation_checkpointing: bool = False  # keep only the inputs of blocks for backward and recompute the rest

    def gpt(self) -> GPTConfig:
        """Return the configuration of OpenAI's network of this size."""
        return GPTConfig(**self.model_dump(include=set(GPTConfig.model_fields)))


class AdamW(Strict):
    """Settings of torch.optim.AdamW, the same at every level. The learning rate belongs to the model's size."""

    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # strict mode refuses a YAML list for a tuple
    eps: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)]


class Recipe(Strict):
    """Training techniques that are not levels of the ladder. Only the trial uses them; levels use these defaults."""

    clip_norm: PositiveFloat | None = None  # clip the gradient to this norm; None: no clipping
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: lower the learning rate to a tenth
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0  # raise the learning rate during the first N steps
    decay: Literal["all", "matrices"] = "all"  # which parameters have weight decay; matrices: not biases and LayerNorms
    tokens_per_step: Annotated[int, Field(gt=0, le=2**27)] | None = None  # None: one batch
    shuffle: bool = False  # random order of the text, even if data.shuffle is off
    # None: as the speed levels
    model: Model | None = None
    learning_rate: PositiveFloat | None = None
    beta2: Fraction | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    batch_size: Count | None = None
    block_size: Tokens | None = None
    steps: Count | None = None
    minutes: PositiveFloat | None = None  # as many steps as fit into this time, at most `steps`
    eval_every: Count | None = None  # validate after every N steps and keep the best network; None: the last one
    start: Annotated[str, Field(min_length=1)] | None = None  # first weights: "openai" or a folder; None: random


class Pretrained(Strict):
    """Where the pretrained weights come from: the hub, a folder, or a random stand-in."""

    source: Literal["auto", "openai", "stand-in"]
    folder: str | None


class Data(Strict):
    """The training text. params.yaml explains the keys."""

    source: Literal["tiny-shakespeare", "text", "parquet", "fineweb-edu"]
    path: Annotated[str, Field(min_length=1)]
    column: str
    val_tokens: Tokens
    shard_tokens: Tokens
    shuffle: bool


class Rounds(Strict):
    """Length of the benchmark: at most `rounds` rounds and `seconds` seconds, but at least MINIMUM_ROUNDS rounds."""

    rounds: Annotated[int, Field(ge=MINIMUM_ROUNDS, lt=2**63)]
    seconds: PositiveFloat


class TrialTime(Strict):
    """How long the trial takes steps in turn with BASELINE, after its training; 0: not at all."""

    seconds: Annotated[float, Field(ge=0)]


class Tolerances(Strict):
    """Largest allowed difference, in nats, from the baseline's loss in the first `steps` steps, by precision."""

    steps: Count
    fp32: PositiveFloat
    tf32: PositiveFloat
    bf16: PositiveFloat


class Peaks(Strict):
    """Peak TFLOP/s of dense matrix products, by precision. None: look up the GPU, or measure the CPU."""

    fp32: PositiveFloat | None
    tf32: PositiveFloat | None
    bf16: PositiveFloat | None


def _allow_sparse_rows(schema: dict[str, Any]) -> None:
    """Make all keys optional in the JSON schema of `levels`, because `defaults` has them too."""
    schema["additionalProperties"] = Level.model_json_schema() | {"required": []}


class Params(Switches):
    """All settings of params.yaml. The inherited switches are those of the trial."""

    model: Model
    machine: Literal["cpu", "gpu"]
    rehearsal: bool
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    deterministic: bool
    checkpoint_every: Count | None
    devices: Count
    run_slow_levels: bool
    data: Data
    pretrained: Pretrained
    optimizer: AdamW
    recipe: Recipe
    quality: Shape
    machines: dict[Literal["cpu", "gpu"], Shape]
    benchmark: dict[Literal["cpu", "gpu"], Rounds]
    trial: dict[Literal["cpu", "gpu"], TrialTime]
    profile: bool
    parity: Tolerances
    peak_tflops: Peaks
    models: dict[Model, ModelSize]
    defaults: Level
    levels: Annotated[dict[LevelName, Level], Field(json_schema_extra=_allow_sparse_rows)]

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
            _require(key in rows, name, key, f"{table} only has {', '.join(rows) or 'no rows'}")
        recipe, rule = self.recipe, f"models only has {', '.join(self.models)}"
        _require(recipe.model is None or recipe.model in self.models, "recipe.model", recipe.model, rule)
        machine, own = f"machines.{self.machine}", self.for_trial()
        shape, speed = own.shape("speed"), self.shape("speed")
        shapes = ("quality", self, self.quality), (machine, self, speed), ("recipe", own, shape)
        for name, settings, checked in shapes:
            rule = f"must be at most models.{settings.model}.n_positions ({settings.size.n_positions})"
            _require(checked.block_size <= settings.size.n_positions, f"{name}.block_size", checked.block_size, rule)
            rule = f"must divide {name}.batch_size ({checked.batch_size})"
            _require(name == "quality" or not checked.batch_size % self.devices, "devices", self.devices, rule)
        tokens, batch_tokens = recipe.tokens_per_step, shape.batch_size * shape.block_size
        rule = f"must be a multiple of the trial's batch_size * block_size ({batch_tokens})"
        _require(not (tokens or 0) % batch_tokens, "recipe.tokens_per_step", tokens, rule)
        rule = f"must be below the trial's steps ({shape.steps})"
        _require(recipe.lr_warmup_steps < shape.steps, "recipe.lr_warmup_steps", recipe.lr_warmup_steps, rule)
        rule = f"only the weights of model {self.model} are downloaded; leave recipe.model empty"
        _require(recipe.start != "openai" or own.model == self.model, "recipe.start", recipe.start, rule)
        rule = "the benchmark uses this name for the baseline's second arm; rename the level"
        _require(CONTROL not in self.levels, f"levels.{CONTROL}", CONTROL, rule)
        rule = "the trial is compared with this level; keep its row"
        _require(BASELINE in self.levels, f"levels.{BASELINE}", None, rule)
        path, rule = self.data.path, f"source {self.data.source} does not read a path; set data.path: {CORPUS}"
        _require(self.data.source in ("text", "parquet") or path == CORPUS, "data.path", path, rule)
        source, folder, ours = self.pretrained.source, self.pretrained.folder, not self.model.startswith("gpt2")
        rule = f"there are no weights for model {self.model}; use auto or stand-in"
        _require(source != "openai" or not ours, "pretrained.source", source, rule)
        rule = "this source and model read no folder; leave it empty"
        _require(folder is None or not (source == "stand-in" or ours), "pretrained.folder", folder, rule)
        return self

    @property
    def size(self) -> ModelSize:
        """The size of the chosen model."""
        return self.models[self.model]

    @property
    def switches(self) -> Switches:
        """The switches of the trial."""
        return Switches(**{name: getattr(self, name) for name in Switches.model_fields})

    @property
    def changes(self) -> dict[str, str]:
        """The trial's switches and recipe where they differ from BASELINE's, by their key in params.yaml."""
        before = self.levels[BASELINE].model_dump() | {f"recipe.{key}": value for key, value in Recipe()}
        after = self.switches.model_dump() | {f"recipe.{key}": value for key, value in self.recipe}
        return {key: str(value).lower() for key, value in after.items() if value != before[key]}

    def shape(self, group: Literal["quality", "speed"]) -> Shape:
        """Return the shape of the levels in `group`."""
        return self.quality if group == "quality" else self.machines[self.machine]

    def for_trial(self) -> "Params":
        """Return these settings with the trial's own size, optimizer, shape and order of the text.

        With `recipe.minutes`, the shape has MOST_STEPS steps, because their number is not known yet.
        """
        recipe, shape = self.recipe, self.shape("speed")
        own = {key: value for key in ("batch_size", "block_size", "steps") if (value := getattr(recipe, key))}
        shape = shape.model_copy(update=({"steps": MOST_STEPS} if recipe.minutes else {}) | own)
        tokens = shape.batch_size * shape.block_size
        eval_tokens = max(shape.eval_tokens // tokens, 1) * tokens
        shape = shape.model_copy(
            update={"eval_tokens": eval_tokens, "warmup_steps": min(shape.warmup_steps, shape.steps - 1)}
        )
        name = recipe.model or self.model
        size = self.models[name]
        update = {"learning_rate": recipe.learning_rate or size.learning_rate}
        if recipe.block_size and not recipe.start:  # positions that are not trained would spoil samples
            update["n_positions"] = min(recipe.block_size, size.n_positions)
        size = size.model_copy(update=update)
        betas, decay = self.optimizer.betas, recipe.weight_decay
        optimizer: dict[str, Any] = {} if recipe.beta2 is None else {"betas": (betas[0], recipe.beta2)}
        optimizer |= {} if decay is None else {"weight_decay": decay}
        changes = {
            "model": name,
            "optimizer": self.optimizer.model_copy(update=optimizer),
            "models": {**self.models, name: size},
            "machines": {**self.machines, self.machine: shape},
            "data": self.data.model_copy(update={"shuffle": self.data.shuffle or recipe.shuffle}),
        }
        return self.model_copy(update=changes)

    def gpt(self, switches: Switches) -> GPTConfig:
        """Return the configuration of the network with the chosen size and `switches`."""
        return self.size.gpt().model_copy(update=switches.model_dump(include=set(GPTConfig.model_fields)))


class Environment(Strict):
    """The machine, as the environment stage describes it. If a value changes, all levels are trained again."""

    device: Literal["cpu", "cuda"]
    device_name: str
    bf16: bool
    compile_problem: str | None  # why torch.compile does not work; None: it works
    threads: Count
    python: str
    torch: str
    platform: str

    @property
    def fingerprint(self) -> str:
        """A short hash of this environment, which is saved in metrics.json of every level."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:7]
