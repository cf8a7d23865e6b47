"""Train the trial: the switches and recipe of params.yaml, with the speed levels' shape. Save the network."""

import shutil

from gpt2_ladder import params_yaml
from gpt2_ladder.config import Params
from gpt2_ladder.model import GPT
from gpt2_ladder.running.run import Inputs, Job
from gpt2_ladder.running.run import run as run_job
from gpt2_ladder.sources import hub_format
from gpt2_ladder.training import devices
from pipeline import PROBE, RESULTS, TRAINING_INPUTS, TRIAL, read_environment, read_json, run


def main() -> None:
    params, environment = params_yaml.load(), read_environment()
    devices.check_machine(params.machine, params.rehearsal, environment)
    inputs, micro_batch = Inputs(*TRAINING_INPUTS), read_json(PROBE)["micro_batch"]
    if not run_job(make_job(params), params, environment, inputs, micro_batch, keep):
        shutil.rmtree(TRIAL, ignore_errors=True)
        TRIAL.mkdir(parents=True, exist_ok=True)  # DVC expects the output, but there is no network to save


def make_job(params: Params) -> Job:
    """Return the job that trains the trial."""
    return Job(
        "trial", "trial", params.switches, params.shape("speed"), params.recipe, params.devices, RESULTS / "trial"
    )


def keep(model: GPT) -> None:
    hub_format.save_gpt(model, TRIAL)


if __name__ == "__main__":
    run(main)
