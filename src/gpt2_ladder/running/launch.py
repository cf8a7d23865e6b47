"""Run a stage on several devices: start the command of this process once for each device, with torchrun."""

import os
import sys
import tempfile
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gpt2_ladder import ledger
from gpt2_ladder.config import UserError
from gpt2_ladder.files import ERROR_FILE
from gpt2_ladder.training import devices

MAX_RESTARTS = 3  # if a rank dies, all ranks are restarted, at most three times
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")  # variables of a rank


def on_ranks(count: int, device: str) -> bool:
    """Run this command on `count` ranks and return True. Return False in a rank, or if `count` is 1.

    A process is a rank if RANK and WORLD_SIZE are set, by this function or by the user's torchrun. Raise UserError if
    this machine has too few devices, or if torchrun started another number of ranks.
    """
    if "RANK" in os.environ:
        _check_rank(count)
        if Path(os.environ.get(ERROR_FILE, "")).is_file():  # this rank was restarted after a UserError
            sys.exit(0)
        if os.environ["RANK"] != "0":
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  until the process ends
        return False
    if count == 1:
        return False
    devices.check_count(device, count)
    with tempfile.TemporaryDirectory() as folder:
        error = Path(folder) / "error"
        os.environ[ERROR_FILE] = str(error)
        # otherwise, restarted ranks find the addresses of dead ranks in the store that all ranks share
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=MAX_RESTARTS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            with ledger.phase("steps"):
                elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
        except (ChildFailedError, SignalException) as reason:
            if not error.exists():
                raise UserError(f"stopped: {reason}") from None
        finally:
            del os.environ[ERROR_FILE]
        if error.exists():
            raise UserError(error.read_text())
    return True


def _check_rank(count: int) -> None:
    """Raise UserError unless torchrun's variables are valid and WORLD_SIZE is `count`."""
    needed = TORCHRUN if count > 1 else TORCHRUN[:2]  # a single rank connects to no others
    values = {name: os.environ.get(name, "") for name in needed}
    if wrong := [name for name, value in values.items() if not (value.isdecimal() or (value and "ADDR" in name))]:
        raise UserError(f"RANK is set, but {', '.join(wrong)} is missing or invalid; unset RANK or use torchrun")
    if int(os.environ["WORLD_SIZE"]) != count:
        raise UserError(
            f"torchrun started {os.environ['WORLD_SIZE']} ranks, but this training uses {count}: set `devices` in "
            "params.yaml to the number of ranks for speed levels and the trial; train quality levels without torchrun"
        )
