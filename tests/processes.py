"""Python in a process of its own, for what concerns a whole process."""

from pathlib import Path

from climbing import REPOSITORY, call

IMPORTABLE = ":".join(str(REPOSITORY / name) for name in ("src", ".", "tests"))


def run(code: str, folder: Path = REPOSITORY) -> str:
    """Run `code`, which can import what a test can, in `folder`; return what it printed."""
    return call(folder, "env", f"PYTHONPATH={IMPORTABLE}", "python", "-c", code)
