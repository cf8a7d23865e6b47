"""Write docs/levels, as the report stage does: a page for each level, code from src/ and numbers from results/."""

from pathlib import Path
from typing import Any

from gpt2_ladder import files, params_yaml
from gpt2_ladder.config import Params
from gpt2_ladder.reporting import level_pages
from pipeline import GAINS, PARITY, PROFILE, read_environment, read_json, read_metrics, run

FOLDER = Path("docs/levels")


def main() -> None:
    write(gather(params_yaml.load()))


def write(gathered: dict[str, Any]) -> None:
    """Write every page, of what `gather` returned."""
    for name, text in level_pages.pages(**gathered).items():
        files.write(FOLDER / name, text)


def gather(params: Params) -> dict[str, Any]:
    """Return what the levels showed, as `levels.pages` and `report.facts` take it."""
    return {
        "levels": params.levels,
        "shapes": {"quality": params.quality, "speed": params.shape("speed")},
        "results": {name: read_metrics(name) for name in params.levels},
        "gains": read_json(GAINS),
        "parity": read_json(PARITY),
        "operators": read_json(PROFILE),
        "environment": read_environment(),
    }


if __name__ == "__main__":
    run(main)
