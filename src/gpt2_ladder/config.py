"""Define and validate the tables of params.yaml with pydantic; params.py has the whole file.

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
NO_EFFECT = "no effect on this device"  # a level whose only change has none is neither trained nor measured
MOST_STEPS = 2**31
MINIMUM_ROUNDS = 6  # one in 16 times, the median is below or above all of 5 values: too often for a 95 % interval

Model = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "small", "tiny"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Attention = Literal["eager", "flash", "cudnn", "efficient"]
Count = Annotated[int, Field(gt=0, lt=2**63)]
Tokens = Annotated[int, Field(gt=1, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # strict mode refuses a YAML list for a tuple
LevelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class UserError(ValueError):
    """An error the user can fix. Stages print it as one line, without a traceback, and exit with 1."""


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError unless `condition` is true. params_yaml.py adds the line of `key` to the message."""
    if not condition:
        raise ValueError(f"{key} = {value}: {rule}")


class Strict(BaseModel):
    """Base class of all settings: no type conversion, no change after loading, no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with those of `values` whose keys are its own, without validation."""
        return self.model_copy(update={key: values[key] for key in values.keys() & type(self).model_fields})


class Switches(Strict):
    """The switches of the ladder. Those after `fused_adamw` are not in Karpathy's video."""

    tie_weights: bool
    init: Literal["pytorch", "gpt2"]
    precision: Precision
    compile: bool
    attention: Attention
    vocab_size: Annotated[int, Field(ge=GPT2_VOCAB_SIZE)]
    fused_adamw: bool
    chunked_loss: bool
    allocator: Literal["system", "caching"]
    autotune: bool
    cuda_graphs: bool

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        for name in ("autotune", "cuda_graphs"):
            require(self.compile or not getattr(self, name), name, "true", "needs a compiled network: compile: true")
        return self


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
        require(warmup < self.steps, "warmup_steps", warmup, f"must be below steps ({self.steps})")
        multiple = not self.eval_tokens % (self.batch_size * self.block_size)
        require(multiple, "eval_tokens", self.eval_tokens, "must be a multiple of batch_size * block_size")
        return self


class Size(Strict):
    """The size of a GPT-2, in the names of its Hugging Face config."""

    n_layer: Annotated[int, Field(gt=0, le=1000)]
    n_head: Count
    n_embd: Count
    n_positions: Tokens

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(not self.n_embd % self.n_head, "n_embd", self.n_embd, f"must be a multiple of n_head ({self.n_head})")
        return self


class GPTConfig(Size):
    """The arguments of `GPT`; the defaults are OpenAI's choices."""

    vocab_size: Count = GPT2_VOCAB_SIZE
    tie_weights: bool = True
    init: Literal["pytorch", "gpt2"] = "gpt2"
    attention: Attention = "eager"
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

    betas: Betas
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
    betas: Betas | None = None
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
    previous_level: PositiveFloat  # from the previous level's loss, if both round in the same way
    fp32: PositiveFloat
    tf32: PositiveFloat
    bf16: PositiveFloat
    fp16: PositiveFloat


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
