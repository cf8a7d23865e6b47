"""Print the right command and exit. Python imports this file only if a tool is run by its file path."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "gpt2_ladder.py"))
