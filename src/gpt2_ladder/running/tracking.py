"""Record the steps of a training in a CSV file, and copy them to a Weights & Biases (W&B) run."""

import csv
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import wandb
from wandb.sdk.lib.wbauth import read_netrc_auth

from gpt2_ladder import files
from gpt2_ladder.config import UserError
from gpt2_ladder.training.metrics import HEADER, Step

PROJECT = "gpt2-ladder"
MODES = ("online", "offline", "disabled")
INIT_TIMEOUT_S = 20  # by default, W&B delays a training by 90 s if there is a key but no network
FINISH_TIMEOUT_S = 60  # by default, W&B waits forever for a server that stopped
FAILURES = (Exception, SystemExit)  # W&B may raise anything, and its teardown exits; Ctrl-C still stops a training


class Tracker:
    """Record one training's steps in `steps_csv` and in the W&B run `run`; close both on exit, also after an error.

    Each of the two may be None. If W&B fails, print one line and continue without it.
    """

    def __init__(self, steps_csv: Path | None, run: wandb.Run | None):
        if steps_csv:  # a new file, because the old one may be a link into DVC's cache
            files.write(steps_csv, HEADER)
        self._file = (steps_csv or Path(os.devnull)).open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._run = run

    def log(self, step: Step) -> None:
        """Append one step and flush it, so that a killed run keeps it."""
        self._writer.writerow(astuple(step))
        self._file.flush()
        values = asdict(step)
        index = values.pop("step")
        self._mirror(lambda run: run.log(values, step=index))

    def summarize(self, metrics: Mapping[str, Any]) -> None:
        """Put `metrics` into the summary of the run, which W&B shows in its table of runs."""
        self._mirror(lambda run: run.summary.update(dict(metrics)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()
        self._mirror(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def _mirror(self, do: Callable[[wandb.Run], object]) -> None:
        if self._run is None:
            return
        try:
            do(self._run)
        except FAILURES as error:
            self._run = None
            print(f"W&B failed ({_one_line(error)}): continuing without it; results/ has every step", flush=True)


def start_run(name: str, job_type: str, tags: Sequence[str], config: Mapping[str, Any], group: str) -> wandb.Run | None:
    """Start a W&B run: online if there is an API key and W&B can be reached, otherwise offline.

    The environment variables WANDB_MODE, WANDB_PROJECT and WANDB_DIR override the defaults. Return None if W&B is
    disabled or cannot start. Raise UserError if WANDB_MODE is not one of MODES.
    """
    mode: Any = os.environ.get("WANDB_MODE")
    if mode and mode not in MODES:
        raise UserError(f"WANDB_MODE={mode}: set it to one of {', '.join(MODES)}")
    if mode == "disabled":
        return None
    try:
        times = wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S)
        about: dict[str, Any] = {"name": name, "group": group, "job_type": job_type, "tags": tags}
        # DVC_ROOT is the real repository; `dvc exp run --temp` deletes its working directory
        about |= {"project": os.environ.get("WANDB_PROJECT", PROJECT), "config": dict(config), "settings": times}
        folder = os.environ.get("WANDB_DIR") or os.environ.get("DVC_ROOT") or "."  # W&B creates wandb/ in it
        init = partial(wandb.init, **about, dir=folder)
        mode = mode or ("online" if has_key() else "offline")
        try:
            run = init(mode=mode)
        except wandb.errors.Error as error:
            wandb.teardown()
            run = init(mode="offline")
            reason = _one_line(error)
            print(f"W&B cannot be reached or refused the run ({reason}): upload it later with `wandb sync`", flush=True)
        print(f"W&B: {Path(run.dir).parent if run.offline else run.url}", flush=True)
    except FAILURES as error:
        print(f"W&B cannot start ({_one_line(error)}): recording this run in results/ only", flush=True)
        return None
    return run


def log_summary(run: wandb.Run | None, results: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
    """Put the results of the ladder and `pictures`, PNG files by name, into `run`, and finish it; None: do nothing."""
    with Tracker(None, run) as tracker:
        tracker.summarize(results)
        tracker._mirror(lambda run: run.log({name: wandb.Image(str(path)) for name, path in pictures.items()}))


def run_group(fingerprint: str) -> str:
    """Return the name of the W&B group for all runs of one `dvc repro`.

    It is WANDB_RUN_GROUP if set, or the DVC experiment's name, or else the commit and the environment's `fingerprint`.
    """
    if name := os.environ.get("WANDB_RUN_GROUP") or os.environ.get("DVC_EXP_NAME"):
        return name
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no Git, or no commit yet
        commit = "uncommitted"
    return f"{commit}-{fingerprint}"


def has_key() -> bool:
    """Return whether W&B has an API key, from WANDB_API_KEY or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        # W&B's own function: the name of its host has changed, and older files have the old name
        return bool(read_netrc_auth(host=wandb.setup().settings.base_url))
    except wandb.errors.AuthenticationError:
        return True  # a malformed key: wandb.init reports it


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
