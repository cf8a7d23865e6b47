"""Check how the user's network behaves, with the weights that it starts from."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_ladder.checking.equal import blocks, capture, error
from gpt2_ladder.checking.loading import Theirs
from gpt2_ladder.config import GPTConfig, UserError
from gpt2_ladder.model import GPT
from gpt2_ladder.training import loop

CPU, STREAM = torch.device("cpu"), "residual stream at init"
PASS, FAIL, VARIANT, UNKNOWN = "pass", "FAIL", "variant", "cannot tell"
SAME = 1e-6  # largest relative difference of what one computation gives twice
CHECKS = {  # why each matters
    "parameters": "a missing or additional weight is another network",
    "loss at init": "a network that knows nothing guesses evenly: ln V nats",
    STREAM: "GPT-2 scales the projections into it by 1/sqrt(2 n_layer)",
    "causality": "a network that sees the next token learns to copy it",
    "rows": "texts of a batch have nothing to do with one another",
    "dropout": "it must be off in eval mode; GPT-2 is compared without it",
    "loss": "a target that is shifted or ignored unseen changes what is learned",
    "gradients": "a parameter without a gradient is never trained",
    "accumulation": "micro-batches must give the gradient of the whole batch",
    "overfit": "a network that cannot learn one batch by heart has a fault",
    "host reads": "the GPU waits whenever forward reads a value",
    "bfloat16": "half of the digits must be enough",
    "loss curve": "equal weights and batches must give equal losses, within the tolerance of parity",
    "function": "equal weights must give equal logits, loss and gradients",
}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    verdict: str
    result: str
    reason: str = ""  # what the result means, if there is more to say than the number


class HostReads(TorchDispatchMode):
    """Count the operators that read values of a tensor back to the host, such as that of .item()."""

    count = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(function).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero"))
        return function(*args, **(kwargs or {}))


def check_parameters(network: nn.Module, config: GPTConfig) -> Finding:
    """Compare the number of parameters with that of a GPT-2 of `config`, and explain the difference."""
    with torch.device("meta"):
        expected = sum(each.numel() for each in GPT(config, seed=None).parameters())
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    count = sum(each.numel() for each in network.parameters())
    matrices = [each for each in network.parameters() if each.dim() == 2 and each.size(1) == C]
    # matrices with C/3 or C/4 rows are layers of a smaller width
    sizes = [len(each) for each in matrices if len(each) == V or len(each) not in (C / 3, C / 4)]
    if not sizes:
        return Finding("parameters", UNKNOWN, f"{count:,}; its width cannot be set to GPT-2's {C}")
    rows = min(sizes, key=lambda size: abs(size - V))  # of the vocabulary
    terms = {  # the parameters that each adds, and whether it still is a GPT-2
        f"the vocabulary is padded to {rows:,}": ((rows - V) * C, True),
        "the head is not tied to the embedding": (rows * C, True),
        "linear layers have no biases": (-9 * C * L, True),
        "LayerNorms have no biases": (-(2 * L + 1) * C, True),
        "the head has a bias": (rows, True),
        "c_attn has no bias": (-3 * C * L, False),
        "the final LayerNorm is missing": (-2 * C, False),
        "the position embeddings are missing": (-config.n_positions * C, False),
        "all blocks are the same one": (-(L - 1) * (12 * C * C + 13 * C), False),
    }
    terms = {name: term for name, term in terms.items() if term[0]}
    text = f"{count:,}; GPT-2 has {expected:,}"
    for size in range(5):
        for names in combinations(terms, size):
            if sum(terms[name][0] for name in names) == count - expected:
                faults = [name for name in names if not terms[name][1]]
                verdict = FAIL if faults else VARIANT if names else PASS
                return Finding("parameters", verdict, text, ", ".join(faults or names))
    return Finding("parameters", FAIL, text, f"{count - expected:+,} parameters are not explained")


def check_loss(theirs: Theirs, logits: Tensor, loss: Tensor | None, targets: Tensor) -> Finding:
    """Find out how a network counts its loss; set theirs.own_loss if it is the cross-entropy with `targets`."""
    logits, loss = logits.detach(), None if loss is None else loss.detach()
    if loss is None:
        why = "forward takes no targets" if theirs.target_name is None else "forward returns none"
        return Finding("loss", UNKNOWN, f"{why}: the cross-entropy of its logits is used")
    V, usual = logits.size(-1), int(theirs.target_name == "labels")  # transformers shifts labels by one

    def cross_entropy(shift: int = usual, **how: Any) -> Tensor:
        return F.cross_entropy(logits[:, : targets.size(1) - shift].flatten(0, 1), targets[:, shift:].flatten(), **how)

    known = {
        "": cross_entropy(),
        "the targets are shifted by one more token": cross_entropy(usual + 1),
        "targets with id 0 are ignored": cross_entropy(ignore_index=0),
        f"targets with id {V - 1} are ignored": cross_entropy(ignore_index=V - 1),
        "it is the sum, not the mean": cross_entropy(reduction="sum"),
    }
    unshifted = "its labels must be the next tokens, as it does not shift them"
    known |= {unshifted: cross_entropy(0)} if usual else {}
    text = f"{float(loss):.5f}, the cross-entropy of its logits and targets is {float(known['']):.5f}"
    alike = (reason for reason, value in known.items() if abs(float(loss) / float(value) - 1) <= 1e-5)
    reason = next(alike, "the difference is not explained")
    theirs.own_loss = reason == unshifted or not (reason or usual)
    if usual and not reason:
        text = "it shifts the labels once, as transformers does; we compute it from its logits"
        theirs.target_name = None  # its own loss would only cost time in the race
    return Finding("loss", PASS if not reason else VARIANT if reason == unshifted else FAIL, text, reason)


def check_stream(theirs: Theirs, ours: GPT, idx: Tensor) -> Finding:
    """Compare what all blocks add to the residual stream at init with ours."""
    sizes = []
    for model, network in ((theirs, theirs.network), (ours, ours)):
        stack = blocks(network)
        seen = capture(model, {"first": stack[0], "last": stack[-1]}, idx) if stack else {}
        if {("first", True), ("last", False)} - seen.keys():
            return Finding(STREAM, UNKNOWN, "no list of blocks was found that forward calls")
        first, last = seen["first", True], seen["last", False]
        sizes += [float(first.std()), float((last - first).std())]
    start, added, our_start, our_added = sizes
    text = f"standard deviation {start:.3f}, and the blocks add {added:.3f}; GPT-2: {our_start:.3f} and {our_added:.3f}"
    if 0.7 < added / our_added < 1.4:
        return Finding(STREAM, PASS, text)
    far = not 0.5 < start / our_start < 2
    what = "embeddings do not have a standard deviation of 0.02" if far else "blocks' outputs are not scaled as GPT-2's"
    return Finding(STREAM, FAIL, text, f"its initial {what}")


def check_behaviour(theirs: Theirs, ours: GPT, seed: int, learning_rate: float) -> Iterator[Finding]:
    """Yield the findings of all checks that copy no weights, and set dropout to 0. The last check trains `theirs`.

    `ours` has GPT-2's init and the size of `theirs`.
    """
    V, T = ours.config.vocab_size, min(32, ours.config.n_positions)
    x, y = torch.randint(V, (2, 4, T), generator=torch.Generator().manual_seed(seed))
    y[:, 1::4], y[:, 2::4] = 0, V - 1  # ids that could be ignored
    later, others = x.clone(), x.clone()
    later[:, T // 2 :], others[::3] = (x[:, T // 2 :] + 1) % V, (x[::3] + 1) % V  # rows 0 and 3
    with torch.no_grad():
        logits, loss = theirs.eval().outputs(x, y)
        with HostReads() as reads:
            again = theirs(x, y)[0]
        random, seen, mixed = error(again, logits), theirs(later, y)[0], theirs(others, y)[0]
        noisy = error(theirs.train()(x, y)[0], theirs(x, y)[0])
        set_dropout_to_zero(theirs)
        left = error(theirs(x, y)[0], theirs.eval()(x, y)[0])
        with torch.autocast("cpu", torch.bfloat16):
            rounded, rounded_loss = theirs.outputs(x, y)
        rounding = error(rounded.float(), theirs(x)[0])
    if not logits.isfinite().all():
        raise UserError(
            "forward returns NaN or infinity: is a softmax over the wrong dimension, or are all its scores -inf?"
        )
    yield check_loss(theirs, logits, loss, y)
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    text = f"{losses.mean():.3f} with a deviation of {losses.std():.3f}; ln V is {math.log(V):.3f}"
    yield Finding("loss at init", PASS if abs(losses.mean() - math.log(V)) < 0.5 else FAIL, text)
    yield check_stream(theirs, ours, x)
    if random > SAME:
        yield Finding("dropout", FAIL, f"in eval mode, one input gives two results, {random:.0e} apart")
    else:
        text = f"on in train mode{'; 0 in all other checks' * (left <= SAME)}" if noisy > SAME else "none"
        reason = "its dropout has a rate in forward, so losses in train mode are not compared" if left > SAME else ""
        yield Finding("dropout", VARIANT if noisy > SAME else PASS, text, reason)
        leak, mixed = error(seen[:, : T // 2], logits[:, : T // 2]), error(mixed[1:3], logits[1:3])
        yield judge("rows", mixed <= SAME, f"another row changes a row's logits by {mixed:.0e}")
        yield judge("causality", leak <= SAME, f"a later token changes earlier logits by {leak:.0e}")
    whole, parts = (gradients(theirs, (x, y), rows) for rows in (4, 2))
    missing = [name for name, each in whole.items() if not each.any()]
    text = f"none for {len(missing)} of {len(whole)} parameters, such as {missing[0]}" if missing else "all have one"
    yield judge("gradients", not missing, text)
    total = get_total_norm([*whole.values()])
    apart = float(get_total_norm([parts[name] - each for name, each in whole.items()]) / total)
    text = f"two micro-batches give a gradient {apart:.0e} from the whole batch's"
    yield judge("accumulation", apart <= 1e-4, text)
    yield Finding("host reads", VARIANT if reads.count else PASS, f"{reads.count} in a forward pass")
    half = rounded_loss is not None and rounded_loss.dtype == torch.bfloat16
    reason = "on a CPU, autocast computes its loss in bfloat16" if half else ""
    verdict = FAIL if rounding > 0.1 else VARIANT if half else PASS
    yield Finding("bfloat16", verdict, f"its logits are {rounding:.1e} from those in float32", reason)
    optimizer = loop.AdamW(theirs.parameters(), lr=learning_rate)
    batch = x[:2] % 256, y[:2] % 256
    curve = [float(loop.train_step(theirs, optimizer, batch, nullcontext(), CPU, 2)[0]) for _ in range(50)]
    yield judge("overfit", curve[-1] < curve[0] / 4, f"from {curve[0]:.2f} to {curve[-1]:.2f} nats in 50 steps")


def gradients(theirs: Theirs, batch: loop.Batch, micro_batch: int) -> dict[str, Tensor]:
    """Return the gradients of the mean loss over `batch`, with `micro_batch` rows at a time; 0 where there is none."""
    theirs.zero_grad()
    loop.accumulate(theirs, batch, nullcontext(), CPU, micro_batch)
    named = theirs.network.named_parameters()
    return {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in named}


def judge(check: str, passed: bool, result: str) -> Finding:
    """Return the finding of a check that passes or fails."""
    return Finding(check, PASS if passed else FAIL, result)


def set_dropout_to_zero(network: nn.Module) -> None:
    """Set the rate of every Dropout to 0, and every number that a module keeps under such a name."""
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)
