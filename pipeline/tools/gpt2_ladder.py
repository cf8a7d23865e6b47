"""Stand in for the package gpt2_ladder if a tool is run by its path: print the right command and exit."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "gpt2_ladder.py"))
