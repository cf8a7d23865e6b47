"""Python in a process of its own, for what concerns a whole process."""

from collections.abc import Sequence
from pathlib import Path

from helpers.climbing import REPOSITORY, call

IMPORTABLE = ":".join(str(REPOSITORY / name) for name in ("src", ".", "tests", "tests/running"))


def run(code: str, folder: Path = REPOSITORY, arguments: Sequence[str] = (), stderr: bool = False) -> str:
    """Run `code`, which can import what a test can, in `folder`; return what it printed, or its errors."""
    return call(folder, "env", f"PYTHONPATH={IMPORTABLE}", "python", "-c", code, *arguments, stderr=stderr)
