"""Count what a process spends its seconds on, from its start to its exit.

At any time the process is in one phase, so the seconds of all phases add up to the time of the process.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("imports", "device", "data", "weights", "compile", "steps", "validation", "recording", "other", "exit")

seconds = dict.fromkeys(PHASES, 0.0)
_current = "imports"
_since = time.monotonic() - time.process_time()  # Python's own start keeps one core busy


def enter(name: str) -> str:
    """Count the seconds from now on under `name`, one of PHASES, and return the phase that ends here."""
    global _current, _since
    ended, now = _current, time.monotonic()
    seconds[ended] += now - _since
    _current, _since = name, now
    return ended


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the seconds of a block, or of a function that this decorates, under `name`, and then return."""
    outer = enter(name)
    try:
        yield
    finally:
        enter(outer)
