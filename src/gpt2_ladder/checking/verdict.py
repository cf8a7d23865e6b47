"""Run all checks of a user's GPT, race it against ours, and say in one sentence what it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpt2_ladder.checking import equal, loading
from gpt2_ladder.checking.behaviour import (
    FAIL,
    PASS,
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

B, T = 2, 256  # rows and tokens of the race's batches
SECONDS = 60  # the race stops then, but not before MINIMUM_ROUNDS
SYMPTOMS = (
    STREAM,
    "loss at init",
    "overfit",
    "accumulation",
    "bfloat16",
)  # these also fail because of other faults: named last
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
        sizes = {sum(each.numel() for each in model.parameters()) for model in (theirs, initial)}
        if pairing and len(sizes) == 1:  # what only one of them has would be trained
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
    known, joined = result.cause, "and" if result.gradient <= equal.GRADIENT else "but other"
    apart = f"{result.gradient:.0e} apart, {result.gradient_of}"
    errors = f"logits ({result.logits:.0e} apart) {joined} gradients ({apart})"
    if not result.same_function:
        where = equal.first_difference(theirs, result.pairing, ids[0])
        text = f"{where}; logits differ by {result.logits:.0e}; no known cause explains it"
        return Finding("function", FAIL, text), None
    last = max(1, ours.config.n_positions - 1)  # one less: positions may start at 1
    whole = torch.randint(ours.config.vocab_size, (1, last), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        far = equal.error(theirs(whole)[0], equal.logits_of(ours, whole, known))
    right = result.gradient <= equal.GRADIENT and far <= equal.LOGITS and (not known or known.is_variant)
    text = f"with equal weights, the same {errors}"
    if known:
        text = f"{equal.first_difference(theirs, result.pairing, ids[0])}; with this change, ours has the same {errors}"
    if far > equal.LOGITS:
        text = f"for {length} tokens the same {errors}, but for {last} tokens logits differ by {far:.0e}"
    verdict = FAIL if not right else VARIANT if known else PASS
    reason = known.what if known and (right or not known.is_variant) else ""
    return Finding("function", verdict, text, reason), result.pairing if right else None


def make_arms(
    theirs: Theirs, ours: GPT, learning_rate: float, adamw: AdamW, device: torch.device, precision: str, compiled: bool
) -> list[turns.Arm]:
    """Return an arm with their network and two with ours."""
    arms, models = [], dict[str, Any]({OURS: ours, YOURS: theirs})
    for name, model in models.items():
        model.to(device).train()
        if compiled:
            runtime.compile_model(model)
        optimizer = loop.make_optimizer(model, learning_rate, adamw, fused=True)
        arms.append(turns.Arm(name, model, optimizer, precision, B, runtime.make_scaler(precision, device)))
    return [*arms, replace(arms[0], name=CONTROL)]


def check_curve(arms: Sequence[turns.Arm], pairing: Pairing, params: Params, device: torch.device) -> Finding:
    """Train both from the same weights on the same batches, and compare their losses as `parity` does."""
    ours, yours, _ = arms
    replace(pairing, ours=ours.model).copy_weights()
    curves, tolerance = [], getattr(params.parity, ours.precision)
    for arm in (yours, ours):
        sent = (devices.send(batch, device) for batch in batches(ours.model, params.parity.steps))
        curves.append([float(arm.take(loop.train_step, each, device)[0]) for each in sent])
    worst = max(abs(a - b) for a, b in zip(*curves, strict=True))
    text = f"at most {worst:.1e} nats from ours in {params.parity.steps} steps from equal weights"
    return judge("loss curve", worst <= tolerance, f"{text}; {tolerance:g} is allowed")


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
