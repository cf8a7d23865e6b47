"""Compare the trial with the level BASELINE: take their steps in turn, and compare their losses."""

import gc
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from gpt2_ladder.config import BASELINE, CONTROL, MINIMUM_ROUNDS, Environment, Recipe, Switches
from gpt2_ladder.measuring import loss_parity, turns
from gpt2_ladder.measuring.gains import ESTIMATOR, Measurement
from gpt2_ladder.measuring.turns import Arm
from gpt2_ladder.params import Params
from gpt2_ladder.training import capabilities, devices, loop

TRIAL = "trial"
ONLY_LONGER = ("recipe.steps", "recipe.minutes", "recipe.eval_every")  # these leave the first losses as they are
MOST_ROUNDS = 100  # the time of the bootstrap grows with the square of the rounds


def compare_losses(
    params: Params, changes: Mapping[str, str], losses: Sequence[float], baseline: Sequence[float]
) -> dict[str, Any]:
    """Return the largest difference to BASELINE's losses in the steps that parity checks, or why there is none."""
    switches = set(Switches.model_fields) - {"tie_weights", "init"}
    if others := [key for key in changes if key not in {*switches, *ONLY_LONGER}]:
        return {"loss_apart": None, "not_compared": f"other losses are expected with {', '.join(others)}"}
    if not (losses and baseline):
        return {"loss_apart": None, "not_compared": f"{BASELINE if losses else 'the trial'} has no losses"}
    steps = params.parity.steps
    expected = loss_parity.padding_cost(params.vocab_size, params.levels[BASELINE].vocab_size)
    # no tolerance: the report shows a wrong trial, and no stage fails
    parity = loss_parity.compare(TRIAL, losses[:steps], baseline[:steps], math.inf, steps, expected)
    return {"loss_apart": parity.largest, "not_compared": None}


def measure(
    params: Params, environment: Environment, micro_batch: int, batches: Sequence[loop.Batch], seconds: float
) -> Measurement:
    """Take steps of the trial, of BASELINE and of its control in turn, as many rounds as fit into `seconds`.

    The trial's training may have changed how this process gets memory. Then BASELINE and the control use another one.
    """
    gc.collect()  # frees the trained network
    baseline, device = params.levels[BASELINE], torch.device(environment.device)
    devices.reset_peak_memory(device)
    levels = {BASELINE: baseline, TRIAL: params.switches, CONTROL: baseline}
    needs = {name: capabilities.needs_own_process(switches, environment) for name, switches in levels.items()}
    apart = [name for name in levels if needs[name] != needs[TRIAL]]
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # starts only if a remote arm uses it
        arms = turns.place_arms(params, environment, micro_batch, levels, apart, process)
        arms = [follow_recipe(arm, params) if isinstance(arm, Arm) and arm.name == TRIAL else arm for arm in arms]
        for name in turns.warm_up(arms, batches[0], device, params.seed, params.cuda_graphs):
            print(f"trial: warming up {name}", flush=True)
        print(f"trial: measuring for {seconds:g} s", flush=True)
        rounds = list(turns.measure(arms, batches, device, MOST_ROUNDS, seconds, params.seed, least=1))
    B, T = batches[0][0].shape
    about: dict[str, Any] = {"model": params.model, "batch_size": B, "block_size": T, "environment": environment}
    return Measurement(estimator=ESTIMATOR, levels=[BASELINE, TRIAL], control=CONTROL, rounds=rounds, **about)


def follow_recipe(arm: Arm, params: Params) -> Arm:
    """Return the trial's arm with an optimizer of its own, which clips and decays as the recipe says."""
    if (recipe := params.recipe) == Recipe():
        return arm
    settings = params.size.learning_rate, params.optimizer, params.fused_adamw, recipe.decay
    optimizer = loop.make_optimizer(arm.model, *settings)

    def clip(*_: object) -> None:
        clip_grad_norm_(arm.model.parameters(), recipe.clip_norm or math.inf)

    if recipe.clip_norm:
        optimizer.register_step_pre_hook(clip)
    return replace(arm, optimizer=optimizer)


def judge(measurement: Measurement) -> dict[str, Any]:
    """Return the measurement with the trial's gain over BASELINE, or with the reason why there is none."""
    count, reason = len(measurement.rounds), f"{MINIMUM_ROUNDS} rounds are needed, but only %s fitted in"
    enough = count >= MINIMUM_ROUNDS
    gain = measurement.compare(TRIAL, BASELINE, measurement.noise()) if enough else None
    return {"measurement": measurement.model_dump(), "gain": gain, "not_measured": None if enough else reason % count}
