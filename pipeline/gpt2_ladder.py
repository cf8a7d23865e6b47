"""Print the right command and exit. Python imports this module if it does not find the package gpt2_ladder."""

import re
import shlex
import sys
from pathlib import Path

import __main__

if match := re.search(r"pipeline(\.\w+)+", " ".join(sys.orig_argv[1:])):  # after -m
    module = match[0]
else:
    path = Path(__main__.__file__).resolve().relative_to(Path(__file__).resolve().parents[1])
    module = ".".join(path.with_suffix("").parts)
command = shlex.join(["python", "-m", module, *sys.argv[1:]])
prepare = "make .venv/installed && source .venv/bin/activate"
sys.exit(f"error: run this from the top of the repository: {prepare} && PYTHONPATH=src {command}")
