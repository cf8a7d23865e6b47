"""The stages of dvc.yaml, one module each. A stage reads params.yaml, calls src and writes its outputs."""

import argparse
import atexit
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from inspect import signature
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

try:
    from gpt2_ladder import config, files, ledger, params_yaml
    from gpt2_ladder.config import Environment, UserError
    from gpt2_ladder.params import Params
    from gpt2_ladder.training import capabilities

    version("torch"), version("ruamel.yaml")  # another environment may have pydantic, but rarely both of these
except ModuleNotFoundError:
    from pipeline import gpt2_ladder  # noqa: F401  prints the right command and exits

CORPUS = Path(config.CORPUS)
CORPUS_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
ENCODER_JSON, VOCAB_BPE = Path("data/bpe/encoder.json"), Path("data/bpe/vocab.bpe")
BPE = (VOCAB_BPE, ENCODER_JSON)
WEIGHTS = Path("data/gpt2")
TRAIN_SHARD, VAL_SHARD = Path("data/train.bin"), Path("data/val.bin")
SHARDS = Path("data/shards")  # the shards of a large corpus after train.bin, and its manifest
TRAINING_INPUTS = (TRAIN_SHARD, SHARDS, VAL_SHARD, ENCODER_JSON)  # the fields of running.run.Inputs
MODELS = Path("models")
TRIAL = MODELS / "trial"
RESULTS = Path("results")
TRIAL_FACTS = RESULTS / "trial" / "facts.json"
ENVIRONMENT = RESULTS / "environment.json"
PROBE = RESULTS / "probe.json"
PARITY = RESULTS / "parity.json"
BENCHMARK = RESULTS / "benchmark.json"
GAINS = RESULTS / "gains.json"
PROFILE = RESULTS / "profile.json"
SECONDS = RESULTS / "seconds"
DEVICE_TIME = RESULTS / "device_time.json"
TRACES = Path("profiles")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong option in one line, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with `message`."""
        raise UserError(f"{message}; for all options, run {self.prog} --help")


def run(main: Callable[..., None], *arguments: str) -> None:
    """Run a stage. Print errors that the user can fix as one line each, without a traceback, and exit with 1."""
    ledger.enter("other")
    try:
        if command := main.__module__ == "__main__" and sys.argv[0] != "-c":  # python -m pipeline.x
            arguments = tuple(sys.argv[1:])
        if arguments and not signature(main).parameters:
            raise UserError(f"{' '.join(arguments)}: python -m pipeline.{Path(sys.argv[0]).stem} takes no arguments")
        main(*arguments)
        if command:
            _leave(Path(sys.argv[0]), arguments)
    except UserError as error:
        _end(str(error))
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except FileNotFoundError as error:
        _end(f"{error.filename} does not exist; run `dvc repro`, which runs all stages in order")
    except Exception as error:
        if not files.disk_is_full(error):
            raise
        _end(f"the disk is full ({_free_space(error)}): {error}; free some space there and run `dvc repro` again")


def _leave(module: Path, arguments: Sequence[str]) -> NoReturn:
    """Write the seconds of a stage, and end its process. To clean up all modules first, Python takes a second."""
    ledger.enter("exit")
    atexit._run_exitfuncs()  # ends W&B and Inductor's workers
    ledger.enter("exit")
    if module.parent.name == "pipeline" and module.stem != "environment" and is_first():
        stage, names = module.stem.removesuffix("_corpus"), takewhile(lambda name: not name.startswith("-"), arguments)
        files.write_json(SECONDS.joinpath(stage, *names).with_suffix(".json"), ledger.seconds)
    sys.stdout.flush()
    os._exit(0)


def _free_space(error: Exception) -> str:
    """Return the free space of the folder where a write failed or, if unknown, of the fullest folder stages use."""
    variables = ("TMPDIR", "WANDB_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME")
    named = (Path(os.environ[name]) for name in variables if os.environ.get(name))
    folders = [Path.cwd(), CORPUS.parent, RESULTS, MODELS, Path("/tmp"), Path.home(), *named]
    if failed := getattr(error, "filename2", None) or getattr(error, "filename", None):
        folders = [next(path for path in Path(str(failed)).parents if path.exists())]
    free, folder = min((shutil.disk_usage(path).free, path) for path in folders if path.exists())
    return f"{free / 2**30:.1f} GiB free in {folder}"


def _end(error: str) -> NoReturn:
    """Print `error` and exit with 1. A rank writes it to ERROR_FILE instead, so that it is printed only once."""
    if path := os.environ.get(files.ERROR_FILE):
        Path(path).write_text(error)
        sys.exit(1)
    sys.exit(f"error: {error}")


def is_first() -> bool:
    """Return whether this process writes the stage's results: not if it is a rank that our own command started."""
    return files.ERROR_FILE not in os.environ and os.environ.get("RANK", "0") == "0"


def read_environment() -> Environment:
    """Return the output of the environment stage."""
    return Environment.model_validate_json(ENVIRONMENT.read_text())


def read_settings() -> tuple[Params, Environment]:
    """Return params.yaml, with `half` applied for this machine, and the output of the environment stage."""
    params, environment = params_yaml.load(), read_environment()
    return capabilities.with_half(params, environment), environment


def check_weights(folder: Path) -> None:
    """Raise UserError if `folder` has the downloaded weights and they changed after the download."""
    if folder.resolve() == WEIGHTS.resolve():
        from gpt2_ladder.sources import downloads  # imported late, because it takes 0.2 s

        downloads.check_recorded(WEIGHTS / "config.json", WEIGHTS / "model.safetensors")


def read_metrics(level: str) -> Any:
    """Return the metrics.json of `level`."""
    return files.read_json(RESULTS / "levels" / level / "metrics.json")
