"""Pages of docs/ of which every benchmark writes its own part."""

import re
from pathlib import Path

PERFORMANCE, RELIABILITY = Path("docs/PERFORMANCE.md"), Path("docs/RELIABILITY.md")


def put(page: Path, part: str, text: str) -> None:
    """Replace what stands in `page` between the comments `<!-- part -->` and `<!-- end of part -->` by `text`."""
    start, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    new, places = re.subn(
        f"{start}.*?{end}", lambda _: f"{start}\n{text.strip()}\n{end}", page.read_text(), flags=re.DOTALL
    )
    if places != 1:
        raise SystemExit(f"error: {page} has {places} places for {part}, not one: {start} ... {end}")
    page.write_text(new)
