"""Define and read the gallery: one file in machines/ for each machine that climbed the ladder."""

import datetime
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from gpt2_ladder.config import Strict, UserError
from gpt2_ladder.measuring.gains import Measurement
from gpt2_ladder.measuring.profiling import Operator

FOLDER, LARGEST = Path("machines"), 200_000  # bytes of a file
OTHERS = "all other operators"
PRIVATE = re.compile(r"(?<![\w./:])(~|/|[A-Za-z]:\\)\w|\w@\w")  # a path, or an address such as user@host


class Training(Strict):
    """One level's training; None or empty: not measured, or the level was skipped."""

    note: str | None = None  # why it was skipped, or what to know about it
    parameters: int | None = None
    losses: tuple[float, ...] = ()  # training loss of every step, in nats
    val_loss: float | None = None
    loss_difference: float | None = None  # the largest difference to the baseline's losses, in nats
    peak_memory_mib: float | None = None
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
    def _nothing_private(self) -> "Machine":
        notes = [training.note for training in self.levels.values()]
        for text in (self.title, *self.notes, *notes, *self.benchmark.environment.model_dump().values()):
            if isinstance(text, str) and PRIVATE.search(text):
                raise ValueError(f"'{text}' contains a path or an address; remove it")
        return self


def read(path: Path) -> Machine:
    """Read a file of the gallery. Raise UserError if it is too large or wrong, FileNotFoundError if it is missing."""
    return parse(path.read_text(errors="replace"), path)


def parse(text: str, path: Path) -> Machine:
    """Check `text`, the content of `path`. Raise UserError if it is too large, wrong, or holds something private."""
    if len(text) > LARGEST:
        raise UserError(f"{path}: {len(text):,} bytes; at most {LARGEST:,} are allowed")
    try:
        return Machine.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None


def read_measurement(path: Path) -> Measurement:
    """Read the rounds of a benchmark.json or of a file of the gallery. Raise UserError if `path` is neither."""
    try:
        content = json.loads(path.read_bytes())
        return Measurement.model_validate(content.get("benchmark", content))
    except (IsADirectoryError, AttributeError, ValueError) as error:  # pydantic's error is a ValueError
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: neither a benchmark.json nor a file of {FOLDER} ({reason:.200})") from None
