"""Record the steps of a training in a CSV file, and copy them to a Weights & Biases (W&B) run."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.lib.wbauth import read_netrc_auth

from gpt2_ladder import files, ledger
from gpt2_ladder.config import Environment, UserError
from gpt2_ladder.params import Params
from gpt2_ladder.training.metrics import HEADER, Step

INTERVAL, SPEED = ("ratio", "low", "high", "verdict"), ("tokens_per_second", "step_ms", "mfu")  # in gains.json
MODES = ("online", "offline", "disabled")
INIT_TIMEOUT_S = 20  # by default, W&B delays a training by 90 s if there is a key but no network
FINISH_TIMEOUT_S = 60  # by default, W&B waits forever for a server that stopped
FAILURES = (Exception, SystemExit)  # W&B may raise anything, and its teardown exits; Ctrl-C still stops a training


class Tracker(AbstractContextManager["Tracker"]):
    """Record one training's steps in `steps_csv` and in the W&B run `run`; close both on exit, also after an error.

    Each of the two may be None. If W&B fails, print one line and continue without it.
    """

    def __init__(self, steps_csv: Path | None, run: wandb.Run | None, tokens_per_step: int):
        if steps_csv:  # a new file, because the old one may be a link into DVC's cache
            files.write(steps_csv, HEADER)
        self._file = (steps_csv or Path(os.devnull)).open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._run, self._tokens_per_step = run, tokens_per_step

    def log(self, step: Step) -> None:
        """Append one step and flush it, so that a killed run keeps it."""
        self._writer.writerow(astuple(step))
        self._file.flush()
        values = asdict(step)
        self._log(values.pop("step"), values)

    def log_validation(self, step: int, loss: float) -> None:
        """Put the validation `loss` after `step` into the run; call it before the next step is logged."""
        self._log(step, {"val_loss": loss})

    def summarize(self, metrics: Mapping[str, Any]) -> None:
        """Put `metrics` into the summary of the run, which W&B shows in its table of runs."""
        self._mirror(lambda run: run.summary.update(dict(metrics)))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        self._mirror(lambda run: run.finish(exit_code=0 if kind is None else 1))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._mirror(lambda run: run.log({**values, "tokens": (step + 1) * self._tokens_per_step}, step=step))

    @ledger.phase("recording")
    def _mirror(self, do: Callable[[wandb.Run], object]) -> None:
        if self._run is None:
            return
        try:
            do(self._run)
        except FAILURES as error:
            self._run = None
            print(f"W&B failed ({_one_line(error)}): continuing without it; results/ has every step", flush=True)


def start_run(config: Mapping[str, Any], **about: Any) -> wandb.Run | None:
    """Start a W&B run with `config` and `about`, arguments of wandb.init.

    It is online if there is an API key and W&B can be reached, otherwise offline. The environment variables WANDB_MODE,
    WANDB_PROJECT and WANDB_DIR override the defaults. Return None if W&B is disabled or cannot start, or if its folder
    has a run with this id. Raise UserError if WANDB_MODE is not one of MODES.
    """
    mode: Any = os.environ.get("WANDB_MODE")
    if mode and mode not in MODES:
        raise UserError(f"WANDB_MODE={mode}: set it to one of {', '.join(MODES)}")
    if mode == "disabled":
        return None
    # DVC_ROOT is the real repository; `dvc exp run --temp` deletes its working directory
    folder = os.environ.get("WANDB_DIR") or os.environ.get("DVC_ROOT") or "."  # W&B creates wandb/ in it
    if "id" in about and any(Path(folder).glob(f"wandb/*run-*-{about['id']}")):
        print(f"W&B: wandb/ has the run {about['id']} already: logging nothing", flush=True)
        return None
    try:
        times = wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S)
        about |= {"config": {**config, "experiment": os.environ.get("DVC_EXP_NAME")}, "settings": times}
        about |= {"project": os.environ.get("WANDB_PROJECT", "gpt2-ladder"), "dir": folder}
        mode = mode or ("online" if has_key() else "offline")
        try:
            run = wandb.init(mode=mode, **about)
        except wandb.errors.Error as error:
            wandb.teardown()
            run = wandb.init(mode="offline", **about)
            reason = _one_line(error)
            print(f"W&B cannot be reached or refused the run ({reason}): upload it later with `wandb sync`", flush=True)
        for metric in ("loss", "val_loss"):  # trainings with other batches share this axis
            run.define_metric(metric, step_metric="tokens")
        print(f"W&B: {Path(run.dir).parent if run.offline else run.url}", flush=True)
    except FAILURES as error:
        print(f"W&B cannot start ({_one_line(error)}): recording this run in results/ only", flush=True)
        return None
    return run


@ledger.phase("recording")
def log_summary(params: Params, environment: Environment, gains: Any, chart: str, images: Mapping[str, Path]) -> None:
    """Log gains.json as a table, the SVG `chart` and the PNG files `images` in a run, once for each measurement."""
    settings = {"model": params.model, "machine": params.machine, "environment": environment.model_dump()}
    about = {"name": "summary", "job_type": "report", "tags": [params.model, environment.device]}
    keys, levels = [(side, key) for side in ("over_previous", "over_baseline") for key in INTERVAL], gains["levels"]
    columns: list[str | int] = ["level", *map("_".join, keys), *SPEED]
    try:
        rows = [[*((row[side] or {}).get(key) for side, key in keys), *map(row.get, SPEED)] for row in levels.values()]
        about |= {"group": run_group(params, environment), "id": f"summary-{_hash(json.dumps(gains))}"}
        if run := start_run(settings, **about):
            with run:
                run.summary.update({key: value for key, value in gains.items() if isinstance(value, str | int)})
                table = wandb.Table(columns, [[name, *row] for name, row in zip(levels, rows, strict=True)])
                pictures = {name: wandb.Image(str(path)) for name, path in images.items()}
                run.log({"gains": table, "ladder": wandb.Html(chart), **pictures})
    except FAILURES as error:
        print(f"W&B failed ({_one_line(error)}): results/report/ has the summary", flush=True)


def trial_name(changes: Mapping[str, str]) -> str:
    """Return the name of the trial's run: what changed, and the DVC experiment; W&B allows 128 characters."""
    what = " ".join(f"{key}={value}" for key, value in changes.items()) or "trial"
    return " · ".join(filter(None, [f"{what:.90}", os.environ.get("DVC_EXP_NAME")]))[:128]


def run_group(params: Params, environment: Environment) -> str:
    """Return the W&B group of all runs with the same code, environment and settings; WANDB_RUN_GROUP replaces it."""
    commit = files.git("log", "-1", "--format=%H", "--", "src", "pipeline", "dvc.yaml", "requirements.txt") or ""
    # the trial's settings, which the trial has instead of params.yaml's; a user may set the excluded one to resume
    settings = params.for_trial().model_dump_json(exclude={"checkpoint_every"})
    name = f"{commit[:7] or 'uncommitted'}-{_hash(environment.fingerprint + settings)}"
    return os.environ.get("WANDB_RUN_GROUP") or name


def has_key() -> bool:
    """Return whether W&B has an API key, from WANDB_API_KEY or from `wandb login`."""
    try:
        # W&B's own function: the name of its host has changed, and older files have the old name
        return bool(os.environ.get("WANDB_API_KEY") or read_netrc_auth(host=wandb.setup().settings.base_url))
    except wandb.errors.AuthenticationError:
        return True  # a malformed key: wandb.init reports it


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
