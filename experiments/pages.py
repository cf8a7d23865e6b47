"""Write an experiment's part of a page in docs/."""

import re
from pathlib import Path

from pipeline import environment

CHECK, EVIDENCE, PERFORMANCE, RELIABILITY, REPLICATION = (
    Path(f"docs/{name}.md") for name in ("check", "evidence", "performance", "reliability", "replication")
)


def conditions() -> str:
    """Return one line about this machine and its software."""
    machine = environment.describe()
    return f"On {machine.device_name}, {machine.threads} threads, torch {machine.torch}, Python {machine.python}."


def replace(page: Path, part: str, text: str) -> str:
    """Return the text of `page` with `text` between the comments `<!-- part -->` and `<!-- end of part -->`."""
    start, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    new, places = re.subn(
        f"{start}.*?{end}", lambda _: f"{start}\n{text.strip()}\n{end}", page.read_text(), flags=re.DOTALL
    )
    if places != 1:
        raise SystemExit(f"error: {page} has {places} places for {part}; it must have one: {start} ... {end}")
    return new


def put(page: Path, part: str, text: str) -> None:
    """Write `text` between the two comments of `part` in `page`."""
    page.write_text(replace(page, part, text))
