"""What Python imports for gpt2_ladder if src is missing in PYTHONPATH: print the command that works, and exit.

`python pipeline/train.py` finds it before src, because Python looks for modules in the script's folder first.
"""

import shlex
import sys
from pathlib import Path

by_name = sys.argv[0] == "-m"  # until Python has found the module
module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if by_name else f"pipeline.{Path(sys.argv[0]).stem}"
command = shlex.join(["python", "-m", module, *sys.argv[1:]])
sys.exit(
    "error: run this from the top of the repository: "
    f"make .venv/installed && source .venv/bin/activate && PYTHONPATH=src {command}"
)
