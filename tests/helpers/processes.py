"""Run Python code in a new process."""

from collections.abc import Sequence
from pathlib import Path

from helpers.climbing import REPOSITORY, call

IMPORTABLE = ":".join(str(REPOSITORY / name) for name in ("src", ".", "tests"))


def run(code: str, folder: Path = REPOSITORY, arguments: Sequence[str] = (), stderr: bool = False) -> str:
    """Run `code` in `folder` with a test's import path; return its stdout, or its stderr."""
    return call(folder, "env", f"PYTHONPATH={IMPORTABLE}", "python", "-c", code, *arguments, stderr=stderr)
