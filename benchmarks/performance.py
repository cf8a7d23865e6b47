"""docs/PERFORMANCE.md, of which every benchmark writes its own part."""

import re
from pathlib import Path

PAGE = Path("docs/PERFORMANCE.md")


def put(part: str, text: str) -> None:
    """Replace what stands between the comments `<!-- part -->` and `<!-- end of part -->` by `text`."""
    start, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    page, places = re.subn(
        f"{start}.*?{end}", lambda _: f"{start}\n{text.strip()}\n{end}", PAGE.read_text(), flags=re.DOTALL
    )
    if places != 1:
        raise SystemExit(f"error: {PAGE} has {places} places for {part}, not one: {start} ... {end}")
    PAGE.write_text(page)
