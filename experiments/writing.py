"""Judge a sample of `make write`, read from stdin: lines that are a name and a colon, and words of the training text.

Run it after a training on tiny Shakespeare: `make sample OPTIONS="--length 300" | python experiments/writing.py`.
"""

import re
import sys
from pathlib import Path


def main() -> None:
    """Print both counts."""
    text, sample = Path("data/input.txt").read_text(encoding="utf-8"), sys.stdin.read()
    known = set(words(text[: len(text) * 9 // 10]))  # the last tenth is for validation
    written = words(sample)
    speakers = re.findall(r"^[A-Z][A-Z ]+:$", sample, re.MULTILINE)
    unknown = [word for word in written if word not in known]
    print(f"{len(speakers)} names: {', '.join(speakers)}")
    print(f"{1 - len(unknown) / len(written):.1%} of {len(written)} words are in the training text; not: {unknown}")


def words(text: str) -> list[str]:
    """Return the words of `text` in lower case."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


if __name__ == "__main__":
    main()
