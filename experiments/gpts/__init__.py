"""Four implementations of GPT-2, NAME.py, and for each a page of faults, NAME.md.

A section `## fault` of a page has the fault's hunks in `diff` fences: lines of NAME.py after `-`, then the lines that
replace them after `+`. A blank line or the next `-` after a `+` starts a new hunk.
"""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
HEADING = re.compile(r"^## (.+)\n", re.MULTILINE)
FENCE = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HUNK = re.compile(r"^((?:-.*\n)+)((?:\+.*\n)*)", re.MULTILINE)


def plant(source: str, section: str) -> str:
    """Return `source` with the hunks of a page's section; each hunk's old lines must occur in it exactly once."""
    for old, new in (hunk for fence in FENCE.findall(section) for hunk in HUNK.findall(fence)):
        old_lines, new_lines = (re.sub("^[-+]", "", lines, flags=re.MULTILINE) for lines in (old, new))
        places = list(re.finditer("^" + re.escape(old_lines), source, re.MULTILINE))
        if len(places) != 1:
            raise ValueError(f"{old_lines!r} occurs {len(places)} times")
        source = source[: places[0].start()] + new_lines + source[places[0].end() :]
    return source


def planted(name: str) -> dict[str, str]:
    """Return every section of NAME.md (a fault, or `variant: ...`), with the complete source that has its hunks."""
    source, page = ((FOLDER / f"{name}{suffix}").read_text() for suffix in (".py", ".md"))
    _, *parts = HEADING.split(page)
    return {heading: plant(source, section) for heading, section in zip(parts[::2], parts[1::2], strict=True)}
