"""Write docs/levels, as the report stage does: a page for each level, code from src/ and numbers from results/."""

import json
from pathlib import Path
from typing import Any

from gpt2_ladder import config, files, levels
from pipeline import GAINS, PARITY, PROFILE, RESULTS, read_environment, run

FOLDER = Path("docs/levels")


def main() -> None:
    for name, text in pages().items():
        files.write(FOLDER / name, text)


def pages() -> dict[str, str]:
    """Return every page by its file name, as params.yaml, results/ and src/ give it now."""
    params = config.load()
    return levels.pages(
        levels=params.levels,
        shapes={"quality": params.quality, "speed": params.shape("speed")},
        results={name: _read(RESULTS / "levels" / name / "metrics.json") for name in params.levels},
        gains=_read(GAINS),
        parity=_read(PARITY),
        operators=_read(PROFILE),
        environment=read_environment(),
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    run(main)
