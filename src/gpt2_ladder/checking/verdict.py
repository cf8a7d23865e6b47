"""Run all checks of a user's GPT, race it against ours, and say in one sentence what it is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpt2_ladder.checking import behaviour, equal, loading
from gpt2_ladder.checking.behaviour import FAIL, PASS, STREAM, UNKNOWN, VARIANT, Finding
from gpt2_ladder.checking.loading import Theirs
from gpt2_ladder.config import Environment
from gpt2_ladder.measuring import gains, turns
from gpt2_ladder.model import GPT
from gpt2_ladder.params import Params
from gpt2_ladder.training import devices, loop, runtime

B, T = 2, 256  # rows and tokens of the race's batches
SECONDS = 60  # the race stops then, but not before MINIMUM_ROUNDS
SYMPTOMS = (STREAM, "loss at init", "overfit", "accumulation", "bfloat16")  # of other faults too: named last
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
    factory = loading.load(name)
    full = loading.with_options(params.models["gpt2"].gpt(), options)
    small = loading.with_options(params.size.gpt(), options)
    with torch.device("meta"):
        findings = [behaviour.check_parameters(loading.build(factory, full, options), full)]
    torch.manual_seed(params.seed)
    theirs = Theirs(loading.build(factory, small, options))
    ours = equal.build_ours(theirs.network, small)
    initial = GPT(ours.config if ours else small, params.seed)
    gpt2 = params.models["gpt2"]
    size = params.size if initial.config.n_embd == small.n_embd else gpt2  # theirs cannot be set, if it is another one
    findings += behaviour.check_behaviour(theirs, initial, params.seed, size.learning_rate)
    finding, pairing = check_function(theirs.eval(), ours, params.seed)
    findings.append(finding)
    if not rounds:
        return conclude(name, findings, "")
    device, arms = devices.open_device(environment.device, environment.threads, params.seed, False), []
    for arm, model in dict[str, Any]({OURS: initial, YOURS: theirs}).items():
        model.to(device).train()
        if compiled:
            runtime.compile_model(model)
        # parity's tolerances are for this learning rate; a small size's, 17 times larger, amplifies rounding
        optimizer = loop.make_optimizer(model, gpt2.learning_rate, params.optimizer, fused=True)
        arms.append(turns.Arm(arm, model, optimizer, precision, B))
    random = any(each.check == "dropout" and each.reason for each in findings)
    curve, speed = race(arms, None if random else pairing, params, device, rounds)
    return conclude(name, findings + curve, speed)


def check_function(theirs: Theirs, ours: GPT | None, seed: int) -> tuple[Finding, equal.Pairing | None]:
    """Compare both networks with equal weights; return the finding, and the pairing if they compute the same."""
    context = ours.config.n_positions if ours else 0
    short, long = min(32, context), max(1, context - 1)  # one less: positions may start at 1
    result = ours and equal.compare(theirs, ours, *random_ids(ours, seed, 2, 2, short))
    if not ours or not result:
        return Finding("function", UNKNOWN, "its weights do not match GPT-2's by shape and order"), None
    where, known = equal.first_difference(theirs, result.pairing, random_ids(ours, seed, 2, short)), result.cause
    if not result.same_function:
        text = f"{where}; logits differ by {result.logits:.0e}; no known cause explains it"
        return Finding("function", FAIL, text), None
    with torch.no_grad():
        ids = random_ids(ours, seed, 1, long)
        far = equal.error(theirs(ids)[0], equal.logits_of(ours, ids, known))
    joined = "and" if result.gradient <= equal.GRADIENT else "but other"
    errors = f"logits ({result.logits:.0e} apart) {joined} gradients"
    errors += f" ({result.gradient:.0e} apart, {result.gradient_of})"
    right = far <= equal.LOGITS and result.gradient <= equal.GRADIENT and (not known or known.is_variant)
    reason = known.what if known and (right or not known.is_variant) else ""
    text = f"with equal weights, the same {errors}"
    if known:
        text = f"{where}{'' if reason else f': {known.what}'}; with this change, ours has the same {errors}"
    if far > equal.LOGITS:
        text = f"for {short} tokens the same {errors}, but for {long} tokens logits differ by {far:.0e}"
    finding = Finding("function", (VARIANT if known else PASS) if right else FAIL, text, reason)
    return finding, result.pairing if right else None


def random_ids(ours: GPT, seed: int, *shape: int) -> torch.Tensor:
    """Return random token ids of `shape`, int64, always the same."""
    return torch.randint(ours.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def race(
    arms: list[turns.Arm], pairing: equal.Pairing | None, params: Params, device: torch.device, rounds: int
) -> tuple[list[Finding], str]:
    """Train ours and theirs, in this order, from equal weights if there is a pairing; then take their steps in turn.

    Return the finding about their losses, as of `parity`, and how much faster a step of theirs is, with the control.
    """
    ours, yours = arms
    length, steps = min(T, ours.model.config.n_positions), params.parity.steps
    ids = random_ids(ours.model, 0, max(4, steps), B, length + 1) % 256
    batches = [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in ids]
    sizes = {sum(each.numel() for each in arm.model.parameters()) for arm in arms}
    findings = []
    if pairing and len(sizes) == 1:  # what only one of them has would be trained
        replace(pairing, ours=ours.model).copy_weights()
        a, b = (
            [float(arm.take(loop.train_step, devices.send(batch, device), device)[0]) for batch in batches[:steps]]
            for arm in arms
        )
        worst, tolerance = (
            float((torch.tensor(a) - torch.tensor(b)).abs().max()),
            getattr(params.parity, ours.precision),
        )
        text = f"at most {worst:.1e} nats from ours in {steps} steps from equal weights; {tolerance:g} is allowed"
        findings.append(behaviour.judge("loss curve", worst <= tolerance, text))  # torch's max is NaN if one loss is
    arms = [ours, yours, replace(ours, name=CONTROL)]
    for _ in turns.warm_up(arms, batches[0], device, params.seed):
        pass
    measured = [*turns.measure(arms, batches, device, rounds, SECONDS, params.seed)]
    times = {arm.name: [each.step_ms[arm.name] for each in measured] for arm in arms}
    gain, control = (gains.gain(times[OURS], times[name]) for name in (YOURS, CONTROL))
    return findings, f"{gain} times as fast as ours (control {control}, {len(measured)} rounds, {ours.precision})"


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
