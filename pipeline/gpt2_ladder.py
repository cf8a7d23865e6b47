"""Stand in for the package gpt2_ladder where Python cannot find it: print the right command and exit."""

import re
import shlex
import sys
from pathlib import Path

found = re.search(r"pipeline\.\w+", " ".join(sys.orig_argv[1:]))  # after -m
module = found[0] if found else f"pipeline.{Path(sys.argv[0]).stem}"
command = shlex.join(["python", "-m", module, *sys.argv[1:]])
prepare = "make .venv/installed && source .venv/bin/activate"
sys.exit(f"error: run this from the top of the repository: {prepare} && PYTHONPATH=src {command}")
