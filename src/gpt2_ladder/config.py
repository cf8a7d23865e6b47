"""Every setting of params.yaml as a strict, frozen pydantic model; params_yaml.py reads the file.

This module never imports torch: it is read at the start of every stage, and importing torch costs seconds.
"""

import hashlib
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

GPT2_VOCAB_SIZE = 50257  # 50,000 merges + 256 bytes + <|endoftext|>
CORPUS = "data/input.txt"  # tiny Shakespeare
CONTROL = "control"  # the benchmark's second arm of the baseline
MINIMUM_ROUNDS = 6  # the median of five lies outside all of them once in 16 times: no interval of theirs holds 95 %

Model = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tiny"]
Count = Annotated[int, Field(gt=0, lt=2**63)]
Tokens = Annotated[int, Field(gt=1, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class UserError(ValueError):
    """Something the user can mend. Stages print it as one line, without a traceback, and exit with 1."""


def printable(text: str) -> str:
    """Return `text`, part of it from a file, with line feeds and whatever else a terminal obeys written out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


class Strict(BaseModel):
    """The rule of this file: no coercion, no change after loading, no unknown key."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Switches(Strict):
    """The switches of the ladder; each level sets all of them. The last three go past the seed."""

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
    """One row of the ladder. Quality levels share one shape everywhere, speed levels the machine's shape."""

    group: Literal["quality", "speed"]


class Shape(Strict):
    """How much is trained: `steps` batches of (batch_size, block_size) tokens, the first `warmup_steps` not timed."""

    batch_size: Count
    block_size: Tokens
    steps: Count
    warmup_steps: Annotated[int, Field(ge=0)]
    eval_tokens: Tokens

    @model_validator(mode="after")
    def _something_is_left_to_measure(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: must be below steps ({self.steps})")
        if self.eval_tokens % (self.batch_size * self.block_size):
            raise ValueError(f"eval_tokens = {self.eval_tokens}: must be a multiple of batch_size * block_size")
        return self


class Size(Strict):
    """The size of a GPT-2, in the names of its Hugging Face config."""

    n_layer: Annotated[int, Field(gt=0, le=1000)]
    n_head: Count
    n_embd: Count
    n_positions: Tokens

    @model_validator(mode="after")
    def _heads_share_the_channels(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd}: must be a multiple of n_head ({self.n_head})")
        return self


class GPTConfig(Size):
    """What `GPT` needs to know, and nothing else; by default OpenAI's choices."""

    vocab_size: Count = GPT2_VOCAB_SIZE
    tie_weights: bool = True
    init: Literal["pytorch", "gpt2"] = "gpt2"
    attention: Literal["eager", "flash"] = "eager"
    chunked_loss: bool = False
    activation_checkpointing: bool = False


class ModelSize(Size):
    """One row of `models`: a size, and what training it needs.

    Attributes:
        activation_checkpointing: keep a block's input alone for backward and compute the rest of it again, which trades
            time for memory. It belongs to the size, so that all levels of a ladder have it or none.
    """

    learning_rate: PositiveFloat
    overfit_loss: PositiveFloat
    activation_checkpointing: bool = False

    def gpt(self) -> GPTConfig:
        """Return OpenAI's network at this size."""
        return GPTConfig(**self.model_dump(include=set(GPTConfig.model_fields)))


class AdamW(Strict):
    """torch.optim.AdamW's settings, the same at every level. The learning rate belongs to the model's size."""

    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # strict mode refuses a YAML list for a tuple
    eps: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)]


class Recipe(Strict):
    """What training goes on to do after the seed, in the trial alone; by default nothing, as in every level.

    Attributes:
        clip_norm: the largest norm that a step's gradient may have; None: any.
        schedule: of the learning rate over the training: constant, or a cosine down to a tenth.
        lr_warmup_steps: how many steps the learning rate takes to rise to its full value.
        decay: what weight decay acts on: all parameters, or matrices only and neither biases nor LayerNorms.
        tokens_per_step: how many tokens' gradients one step accumulates; None: those of one batch.
    """

    clip_norm: PositiveFloat | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["all", "matrices"] = "all"
    tokens_per_step: Annotated[int, Field(gt=0, le=2**27)] | None = None


class Pretrained(Strict):
    """Where GPT-2's published weights come from: the hub, a folder, or nowhere (a random stand-in)."""

    source: Literal["auto", "openai", "stand-in"]
    folder: str | None


class Data(Strict):
    """What is trained on.

    Attributes:
        source: tiny Shakespeare, whose last tenth is for validation; text files, each a document; parquet files, each
            row a document; or FineWeb-Edu's sample of 10 billion tokens. Of these the first tokens are for validation.
        path: of `text` and `parquet`: a file, or a folder of them.
        column: of `parquet`: where the text is.
        val_tokens: how many tokens are for validation.
        shard_tokens: how many tokens lie in a file; only the last one holds fewer.
        shuffle: train on the blocks of block_size tokens in an order drawn from the seed, not in that of the text.
    """

    source: Literal["tiny-shakespeare", "text", "parquet", "fineweb-edu"]
    path: Annotated[str, Field(min_length=1)]
    column: str
    val_tokens: Tokens
    shard_tokens: Tokens
    shuffle: bool


class Rounds(Strict):
    """How long the benchmark takes steps in turn: `rounds`, or as many as fit into `seconds`, but MINIMUM_ROUNDS."""

    rounds: Annotated[int, Field(ge=MINIMUM_ROUNDS, lt=2**63)]
    seconds: PositiveFloat


class Tolerances(Strict):
    """How many nats a loss may be from the baseline's, by precision, in the first `steps` steps."""

    steps: Count
    fp32: PositiveFloat
    tf32: PositiveFloat
    bf16: PositiveFloat


class Peaks(Strict):
    """TFLOP/s of dense matrix products by precision; null: look the GPU up, or measure the CPU."""

    fp32: PositiveFloat | None
    tf32: PositiveFloat | None
    bf16: PositiveFloat | None


class Params(Switches):
    """The whole of params.yaml; the inherited switches are the knobs of the trial."""

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
    profile: bool
    parity: Tolerances
    peak_tflops: Peaks
    models: dict[Model, ModelSize]
    levels: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], Level]

    @model_validator(mode="after")
    def _the_parts_fit_together(self) -> Self:
        for name, key, table, rows in (
            ("model", self.model, "models", self.models),
            ("machine", self.machine, "machines", self.machines),
            ("machine", self.machine, "benchmark", self.benchmark),
        ):
            if key not in rows:
                raise ValueError(f"{name} = {key}: {table} describes only {', '.join(rows) or 'nothing'}")
        for name, shape in (("quality", self.quality), (f"machines.{self.machine}", self.shape("speed"))):
            if shape.block_size > self.size.n_positions:
                raise ValueError(
                    f"{name}.block_size = {shape.block_size}: is over models.{self.model}.n_positions "
                    f"({self.size.n_positions})"
                )
        tokens, shape = self.recipe.tokens_per_step, self.shape("speed")
        if shape.batch_size % self.devices:
            raise ValueError(
                f"devices = {self.devices}: machines.{self.machine}.batch_size ({shape.batch_size}) must be a multiple "
                "of it, because every device trains as many rows of a batch"
            )
        if tokens and tokens % (shape.batch_size * shape.block_size):
            raise ValueError(
                f"recipe.tokens_per_step = {tokens}: must be a multiple of machines.{self.machine}'s batch_size * "
                f"block_size ({shape.batch_size * shape.block_size})"
            )
        if self.recipe.lr_warmup_steps >= shape.steps:
            raise ValueError(
                f"recipe.lr_warmup_steps = {self.recipe.lr_warmup_steps}: must be below "
                f"machines.{self.machine}.steps ({shape.steps})"
            )
        if CONTROL in self.levels:
            raise ValueError(
                f"levels.{CONTROL} = {CONTROL}: that is what the benchmark calls the baseline's second arm"
            )
        if self.data.source in ("tiny-shakespeare", "fineweb-edu") and self.data.path != CORPUS:
            raise ValueError(f"data.path = {self.data.path}: {self.data.source} does not read it; leave it {CORPUS}")
        source = self.pretrained.source
        if source == "openai" and self.model == "tiny":
            raise ValueError(f"pretrained.source = openai: no weights for model: {self.model}; use auto or stand-in")
        if self.pretrained.folder is not None and (source == "stand-in" or self.model == "tiny"):
            raise ValueError(f"pretrained.folder = {self.pretrained.folder}: not read with these source and model")
        return self

    @property
    def size(self) -> ModelSize:
        """The size of the chosen model."""
        return self.models[self.model]

    @property
    def switches(self) -> Switches:
        """The trial's knobs alone."""
        return Switches(**{name: getattr(self, name) for name in Switches.model_fields})

    def shape(self, group: Literal["quality", "speed"]) -> Shape:
        """Return the shape at which the levels of `group` train; the trial trains at the speed levels' shape."""
        return self.quality if group == "quality" else self.machines[self.machine]

    def gpt(self, switches: Switches) -> GPTConfig:
        """Return the network of the chosen size with `switches` applied."""
        return self.size.gpt().model_copy(
            update=switches.model_dump(include={"vocab_size", "tie_weights", "init", "attention", "chunked_loss"})
        )


class Environment(Strict):
    """What the environment stage found out about this machine; a level re-runs when any of it changes."""

    device: Literal["cpu", "cuda"]
    device_name: str
    bf16: bool
    compile_problem: str | None  # why torch.compile cannot work here, None where it can
    threads: Count
    python: str
    torch: str
    platform: str

    @property
    def fingerprint(self) -> str:
        """A short name for exactly this environment; every level's metrics carry it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:7]
