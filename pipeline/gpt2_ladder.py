"""What Python imports for gpt2_ladder without PYTHONPATH=src and in `python pipeline/x.py`: print what works, exit."""

import shlex
import sys
from pathlib import Path

# sys.argv[0] is "-m" until Python has found the module
module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if sys.argv[0] == "-m" else f"pipeline.{Path(sys.argv[0]).stem}"
command = shlex.join(["python", "-m", module, *sys.argv[1:]])
prepare = "make .venv/installed && source .venv/bin/activate"
sys.exit(f"error: run this from the top of the repository: {prepare} && PYTHONPATH=src {command}")
