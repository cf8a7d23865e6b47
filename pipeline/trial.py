"""Train once on the top-level knobs of params.yaml and its recipe, at the speed levels' shape; keep the network."""

import shutil

from gpt2_ladder import config, hub
from pipeline import MODELS, RESULTS, run
from pipeline.train import train


def main() -> None:
    params = config.load()
    model = train(params, "trial", "trial", params.switches, "speed", RESULTS / "trial", params.recipe)
    folder = MODELS / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    if model is None:
        folder.mkdir(parents=True)  # DVC wants the output to exist; there is no network to put into it
    else:
        hub.save_gpt(model, folder)


if __name__ == "__main__":
    run(main)
