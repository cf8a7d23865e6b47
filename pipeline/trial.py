"""Train once on the top-level knobs of params.yaml and its recipe, at the speed levels' shape; keep the network."""

import shutil

from gpt2_ladder import params_yaml
from gpt2_ladder.model import GPT
from gpt2_ladder.sources import hub_format
from pipeline import RESULTS, TRIAL, run
from pipeline.train import train


def main() -> None:
    params = params_yaml.load()
    trained = train(params, "trial", "trial", params.switches, "speed", RESULTS / "trial", params.recipe, keep)
    if not trained:
        shutil.rmtree(TRIAL, ignore_errors=True)
        TRIAL.mkdir(parents=True, exist_ok=True)  # DVC wants the output to exist; there is no network to put into it


def keep(model: GPT) -> None:
    hub_format.save_gpt(model, TRIAL)


if __name__ == "__main__":
    run(main)
