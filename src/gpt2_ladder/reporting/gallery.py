"""Define and read the gallery: one file in machines/ for each machine that climbed the ladder."""

import datetime
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from gpt2_ladder.config import BASELINE, MINIMUM_ROUNDS, Strict, UserError
from gpt2_ladder.measuring.cost import Operator
from gpt2_ladder.measuring.gains import Measurement

FOLDER, LARGEST = Path("machines"), 200_000  # characters of a file
OTHERS = "all other operators"
# in a JSON string: paths, addresses, host names, escaped characters, and what breaks a Markdown table
PRIVATE = re.compile(r"(?<![\w)])~?/|\b(home|Users)/|[A-Za-z]:/|\\(?!u)|\$\w|\w@\w|\.local\b|(\d+\.){3}\d|\||<!--")


class Training(Strict):
    """One level's training; None or empty: not measured, or the level was skipped."""

    note: str | None = None  # why it was skipped, or what to know about it
    parameters: int | None = None
    losses: tuple[float, ...] = ()  # training loss of every step, in nats
    val_loss: float | None = None
    loss_difference: float | None = None  # the largest difference to the baseline's losses, in nats
    peak_memory_mib: float | None = None
    peak_memory_reserved_mib: float | None = None
    compile_seconds: float | None = None
    compile_cache: str | None = None  # "cold" or "warm"
    attention_kernel: str | None = None
    operators: tuple[Operator, ...] = ()  # the costliest of one profiled step, and the sum of the others


class Machine(Strict):
    """The content of machines/NAME.json."""

    version: Literal[1]
    title: Annotated[str, Field(min_length=1, max_length=40)]  # heads the machine's columns
    commit: Annotated[str, Field(pattern="^[0-9a-f]{7,40}$")]  # of this project, which was measured
    date: Annotated[datetime.date, Field(strict=False)]
    benchmark: Measurement  # environment, shape, and every round
    levels: dict[str, Training] = Field(default={})
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        run, arms = self.benchmark, {*self.benchmark.levels, self.benchmark.control}
        complete = all({*round_.step_ms} == arms and min(round_.step_ms.values()) > 0 for round_ in run.rounds)
        rule = f"needs {MINIMUM_ROUNDS} rounds with positive times of every level and the control; first {BASELINE}"
        if not complete or len(run.rounds) < MINIMUM_ROUNDS or run.levels[:1] != [BASELINE]:
            raise ValueError(rule)
        return self


def read(path: Path) -> Machine:
    """Read a file of the gallery. Raise UserError if it is missing, too large or wrong."""
    if not path.is_file():
        raise UserError(f"{path}: not a file of the gallery: no such file")
    return parse(path.read_text(errors="replace"), path)


def parse(text: str, path: Path) -> Machine:
    """Check `text`, the content of `path`. Raise UserError if it is too large, wrong, or holds something private."""
    if len(text) > LARGEST:
        raise UserError(f"{path}: {len(text):,} characters; at most {LARGEST:,} are allowed")
    for string in re.findall(r'"((?:[^"\\]|\\.)*)"', text):
        if PRIVATE.search(re.sub(r"https?://\S+", "", string)):
            raise UserError(f"{path}: '{string}' contains a path, an address or a special character; remove it")
    try:
        return Machine.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{path}: not a file of the gallery: {place}: {first['msg']}") from None
