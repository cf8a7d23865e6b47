"""A stage on several devices: the same command again, once a device, by torchrun."""

import os
import sys
import tempfile
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gpt2_ladder.config import UserError
from gpt2_ladder.training import devices
from pipeline import ERROR_FILE

MAX_RESTARTS = 3  # of all ranks, where one dies
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")  # for every rank


def on_ranks(count: int, device: str) -> bool:
    """Run this very command on `count` ranks, and return True; False in a rank, and where one process does.

    A rank that torchrun's user started is known by RANK and WORLD_SIZE, as one from here.

    Raises:
        UserError: as many devices are not there, or torchrun was told another number of ranks.
    """
    if "RANK" in os.environ:
        needed = TORCHRUN if count > 1 else TORCHRUN[:2]  # one process joins no others
        values = {name: os.environ.get(name, "") for name in needed}
        if wrong := [name for name, value in values.items() if not (value.isdecimal() or (value and "ADDR" in name))]:
            raise UserError(f"{', '.join(wrong)}: not as torchrun sets it, but RANK is set; unset RANK or use torchrun")
        if int(os.environ["WORLD_SIZE"]) != count:
            raise UserError(
                f"torchrun started {os.environ['WORLD_SIZE']} ranks where {count} are to train: `devices` in "
                "params.yaml is how many train a speed level and the trial; quality levels train on one, without it"
            )
        if Path(os.environ.get(ERROR_FILE, "")).is_file():  # restarted after an error that only the user can mend
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
        # otherwise ranks that are started again find the addresses of the dead ones in the store that they share
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
            elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
        except (ChildFailedError, SignalException) as reason:
            if not error.exists():
                raise UserError(f"stopped: {reason}") from None
        finally:
            del os.environ[ERROR_FILE]
        if error.exists():
            raise UserError(error.read_text())
    return True
