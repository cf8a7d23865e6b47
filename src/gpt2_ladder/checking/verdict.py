"""Run all checks of a user's GPT, race it against ours, and say in one sentence what it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from gpt2_ladder.checking import equal, loading
from gpt2_ladder.checking.behaviour import (
    FAIL,
    STREAM,
    UNKNOWN,
    VARIANT,
    Finding,
    check_behaviour,
    check_parameters,
    judge,
)
from gpt2_ladder.checking.equal import Pairing
from gpt2_ladder.checking.loading import Theirs
from gpt2_ladder.config import AdamW, Environment
from gpt2_ladder.measuring import gains, turns
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.training import devices, loop, runtime

B, T, SECONDS = 2, 256, 60  # of the race: rows and tokens of a batch, and the longest time after MINIMUM_ROUNDS
SYMPTOMS = (STREAM, "loss at init", "overfit", "accumulation", "bfloat16")  # of other faults, or hard to understand
OURS, YOURS, CONTROL = "ours", "yours", "ours again"


@dataclass(frozen=True)
class Report:
    """What the page shows. `code` is 0 for GPT-2 and its variants, 1 for a fault, and 2 for "cannot tell"."""

    name: str
    sentence: str
    findings: list[Finding]
    speed: str
    code: int


def check(
    name: str,
    options: Mapping[str, Any],
    params: Params,
    environment: Environment,
    precision: str = "fp32",
    compiled: bool = False,
    rounds: int = 12,
) -> Report:
    """Check the class or function `name`; `options` change its config. Race it for `rounds` rounds, or not if 0.

    It is built at the size of `params`. Raise UserError if it cannot be loaded, built or called.
    """
    factory, findings = loading.load(name), list[Finding]()
    full = loading.with_options(params.models["gpt2"].gpt(), options)
    small = loading.with_options(params.size.gpt(), options)
    with torch.device("meta"):
        findings.append(check_parameters(loading.build(factory, full, options), full))
    torch.manual_seed(params.seed)
    theirs = Theirs(loading.build(factory, small, options))
    ours = equal.build_ours(theirs.network, small)
    initial = GPT(ours.config if ours else small, params.seed)
    fixed = initial.config.n_embd != small.n_embd  # the size cannot be set; probably it is GPT-2's
    learning_rate = (params.models["gpt2"] if fixed else params.size).learning_rate
    findings += check_behaviour(theirs, initial, params.seed, learning_rate)
    finding, pairing = check_function(theirs.eval(), ours, params.seed)
    findings.append(finding)
    speed = ""
    if rounds:
        device = devices.open_device(environment.device, environment.threads, params.seed, False)
        arms = make_arms(theirs, initial, learning_rate, params.optimizer, device, precision, compiled)
        if pairing:
            findings.append(check_curve(arms, pairing, params, device))
        speed = race(arms, params, device, rounds)
    return conclude(name, findings, speed)


def check_function(theirs: Theirs, ours: GPT | None, seed: int) -> tuple[Finding, Pairing | None]:
    """Compare both networks with equal weights; return the finding, and the pairing if they compute the same."""
    unknown = Finding("function", UNKNOWN, "its weights match GPT-2's neither by name nor by shape and order"), None
    if ours is None:
        return unknown
    length = min(32, ours.config.n_positions)
    ids = torch.randint(ours.config.vocab_size, (2, 2, length), generator=torch.Generator().manual_seed(seed))
    result = equal.compare(theirs, ours, *ids)
    if result is None:
        return unknown
    errors = f"logits within {result.logits:.0e}, gradients within {result.gradient:.0e} ({result.gradient_of})"
    longest = torch.randint(
        ours.config.vocab_size, (1, max(1, ours.config.n_positions - 1))
    )  # one less: positions may start at 1
    with torch.no_grad():
        far = equal.error(theirs(longest)[0], equal.logits_of(ours, longest, result.cause))
    if result.same_function and far > equal.LOGITS:
        text = f"{errors} for {length} tokens, but logits differ by {far:.0e} for {longest.numel()}"
        return Finding("function", FAIL, text), None
    if result.same_function and not result.cause:
        return judge("function", result.gradient <= equal.GRADIENT, errors), result.pairing
    where = equal.first_difference(theirs, result.pairing, ids[0])
    if not result.cause:
        return Finding(
            "function", FAIL, f"{where}; logits differ by {result.logits:.0e}; no known cause explains it"
        ), None
    verdict = VARIANT if result.cause.is_variant else FAIL
    text = f"{where}; with this change, our network has equal {errors}"
    return Finding("function", verdict, text, result.cause.what), result.pairing


def make_arms(
    theirs: Theirs,
    ours: GPT,
    learning_rate: float,
    adamw: AdamW,
    device: torch.device,
    precision: str,
    compiled: bool,
) -> list[turns.Arm]:
    """Return an arm with their network and two with ours."""
    arms = []
    for name, model in {OURS: ours, YOURS: theirs}.items():
        model.to(device).train()
        if compiled:
            runtime.compile_model(model)
        optimizer = loop.make_optimizer(cast(GPT, model), learning_rate, adamw, fused=True)
        arms.append(turns.Arm(name, cast(GPT, model), optimizer, precision, B, runtime.make_scaler(precision, device)))
    return [*arms, replace(arms[0], name=CONTROL)]


def check_curve(arms: Sequence[turns.Arm], pairing: Pairing, params: Params, device: torch.device) -> Finding:
    """Train both from the same weights on the same batches, and compare their losses as `parity` does."""
    ours, yours, _ = arms
    replace(pairing, ours=ours.model).copy_weights()
    steps, tolerance = params.parity.steps, getattr(params.parity, ours.precision)
    curves = [
        [
            float(arm.take(loop.train_step, devices.send(batch, device), device)[0])
            for batch in batches(ours.model, steps)
        ]
        for arm in (yours, ours)
    ]
    worst = max(abs(a - b) for a, b in zip(*curves, strict=True))
    text = f"at most {worst:.1e} nats from ours in {steps} steps from equal weights; {tolerance:g} is allowed"
    return judge("loss curve", worst <= tolerance, text)


def batches(ours: GPT, count: int) -> list[loop.Batch]:
    """Return `count` batches of random ids, at most 256 different ones, always the same."""
    generator, length = torch.Generator().manual_seed(0), min(T, ours.config.n_positions)
    ids = torch.randint(min(256, ours.config.vocab_size), (count, B, length + 1), generator=generator)
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in ids]


def race(arms: Sequence[turns.Arm], params: Params, device: torch.device, rounds: int) -> str:
    """Return how much faster a step of theirs is than one of ours, measured in turn, with the control's interval."""
    shards = batches(arms[0].model, 4)
    for _ in turns.warm_up(arms, shards[0], device, params.seed):
        pass
    measured = [*turns.measure(arms, shards, device, rounds, SECONDS, params.seed)]
    times = {arm.name: [each.step_ms[arm.name] for each in measured] for arm in arms}
    gain, control = gains.gain(times[OURS], times[YOURS]), gains.gain(times[OURS], times[CONTROL])
    return f"{gain} times as fast as ours (control {control}, {len(measured)} rounds, {arms[0].precision})"


def conclude(name: str, findings: list[Finding], speed: str) -> Report:
    """Return the report, with the sentence that matters most on top."""
    function = next(each for each in findings if each.check == "function")
    failed = sorted((each for each in findings if each.verdict == FAIL), key=lambda each: each.check in SYMPTOMS)
    variants = [each.reason for each in findings if each.verdict == VARIANT and each.reason]
    if function.verdict == FAIL and function.reason:
        sentence = f"{function.reason}: {function.result}"
    elif failed:
        what = {FAIL: "is not GPT-2", UNKNOWN: "has a fault"}.get(function.verdict, "computes GPT-2, but has a fault")
        sentence = f"Your network {what} ({failed[0].check}): {failed[0].reason or failed[0].result}"
    elif function.verdict == UNKNOWN:
        sentence = f"Cannot tell whether your network is GPT-2: {function.result}. The other checks found no fault"
    else:
        sentence = f"Your network is GPT-2{', but ' * bool(variants)}{', '.join(variants)}"
        sentence += f", and its step is {speed}" if speed else ""
    return Report(name, f"{sentence}.", findings, speed, 1 if failed else 2 if function.verdict == UNKNOWN else 0)
