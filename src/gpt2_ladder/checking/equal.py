"""Give the user's network our weights, and compare what both compute."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_ladder.checking.causes import CAUSES, EXACT_GELU, Cause, changed
from gpt2_ladder.checking.loading import NAMES, Theirs, tensors
from gpt2_ladder.config import GPTConfig
from gpt2_ladder.measuring import step_check
from gpt2_ladder.model import GPT

LOGITS, GRADIENT = 2e-5, 1e-4  # largest relative errors in float32
POINTS = {  # of our modules: the input, if it is a point of its own, and the output, as a sentence names them
    "ln_1": ("the block's input", "ln_1's output"),
    "attn.c_attn": ("", "c_attn's output"),
    "attn.c_proj": ("attention's result", "c_proj's output"),
    "ln_2": ("the sum after attention", "ln_2's output"),
    "mlp.c_fc": ("", "c_fc's output"),
    "mlp.c_proj": ("the activation's result", "the MLP's output"),
    "ln_f": ("ln_f's input", "ln_f's output"),
}


@dataclass(frozen=True)
class Pairing:
    """Which parameters and modules of a user's network are which of `ours`."""

    ours: GPT
    parameters: dict[str, list[nn.Parameter]]  # theirs, by the name of ours; three if q, k and v are separate
    modules: dict[str, nn.Module]  # theirs, by the name of ours
    transposed: bool  # matrices in the blocks are (in, out), as those of Conv1D are

    def laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor`, which belongs to the parameter `name` of ours, in their layout, or from it in ours."""
        return tensor.T if self.transposed and name.startswith("h.") and tensor.dim() == 2 else tensor

    def pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter of theirs with its part of ours, in their layout."""
        for name, theirs in self.parameters.items():
            for parameter, part in zip(theirs, self.ours.get_parameter(name).chunk(len(theirs)), strict=False):
                yield parameter, self.laid_out(name, part)

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Copy the weights of ours to theirs; those that theirs has no place for become 0 in ours."""
        for name, parameter in self.ours.named_parameters():
            if name not in self.parameters:
                parameter.zero_()
        for theirs, part in self.pairs():
            theirs.copy_(part)


def blocks(network: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """Return the list of the network's blocks: that with the most parameters, equally many in each entry."""
    lists = [each for each in network.modules() if isinstance(each, nn.ModuleList | nn.Sequential) and len(each)]
    sizes = {each: [sum(p.numel() for p in block.parameters()) for block in each] for each in lists}
    return max((each for each in lists if len({*sizes[each]}) == 1), key=lambda each: sum(sizes[each]), default=None)


def weight(module: nn.Module) -> nn.Parameter:
    """Return the own parameter of `module` that has the most dimensions, the first of them."""
    return max(module.parameters(recurse=False), key=Tensor.dim)


def layers(modules: Iterable[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return those of `modules` that have a matrix, and the LayerNorms, which have only vectors; tied weights once."""
    first: dict[nn.Parameter, nn.Module] = {}
    for module in modules:
        if [*module.parameters(recurse=False)]:
            first.setdefault(weight(module), module)
    matrices = [module for parameter, module in first.items() if parameter.dim() == 2]
    return matrices, [module for parameter, module in first.items() if parameter.dim() == 1]


def outer_layers(network: nn.Module, n_positions: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the layers outside the blocks: of the matrices first that of the ids, then of the positions, the head."""
    inside = {*(blocks(network) or nn.ModuleList()).modules()}
    modules = sorted(network.modules(), key=lambda each: isinstance(each, nn.Linear) - isinstance(each, nn.Embedding))
    matrices, norms = layers(each for each in modules if each not in inside)
    return sorted(matrices, key=lambda each: (isinstance(each, nn.Linear), len(weight(each)) == n_positions)), norms


def build_ours(network: nn.Module, config: GPTConfig) -> GPT | None:
    """Return a GPT of the size of `network`, without weights, or None if `network` does not look like a GPT-2.

    `config` is what was asked for. If `network` has another width, its modules show its number of heads.
    """
    stack, shapes = blocks(network), [weight(each).shape for each in outer_layers(network, config.n_positions)[0]]
    known = [vars(module).get(name) for module in network.modules() for name in NAMES["n_head"]]
    fixed = next((number for number in known if isinstance(number, int)), config.n_head)
    n_head = config.n_head if shapes and shapes[0][1] == config.n_embd else fixed
    if stack is None or len(shapes) not in (2, 3) or shapes[0][1] % n_head or len({C for _, C in shapes}) > 1:
        return None
    sizes = {"n_layer": len(stack), "n_embd": shapes[0][1], "n_positions": shapes[1][0], "vocab_size": shapes[0][0]}
    return GPT(GPTConfig.model_validate({**sizes, "n_head": n_head, "tie_weights": len(shapes) == 2}), seed=None)


def pairings(network: nn.Module, ours: GPT) -> Iterator[Pairing]:
    """Yield the ways in which `network` may be `ours`, by shape and order of registration.

    Three square matrices before the last one are tried as q, k and v in every order.
    """
    for order in permutations(range(3)):
        matrices, norms = outer_layers(network, ours.config.n_positions)
        places = dict(zip(("wte", "wpe", "lm_head"), [[each] for each in matrices], strict=False))
        places |= {"ln_f": norms[-1:]}
        for index, block in enumerate(blocks(network) or ()):
            matrices, norms = layers(block.modules())
            kinds = defaultdict[float, list[nn.Module]](list)  # by the ratio of their sizes
            for module in matrices:
                kinds[max(weight(module).shape) / min(weight(module).shape)].append(module)
            if len(kinds[1]) == 4:
                kinds[3], kinds[1] = [kinds[1][i] for i in order], kinds[1][3:]
            parts = {"attn.c_attn": kinds[3], "attn.c_proj": kinds[1], "ln_1": norms[:1], "ln_2": norms[1:]}
            parts |= {"mlp.c_fc": kinds[4][:1], "mlp.c_proj": kinds[4][1:]}
            places |= {f"h.{index}.{name}": modules for name, modules in parts.items()}
        if not all(places.values()):
            return
        parameters = {}
        for name, modules in places.items():
            parameters[f"{name}.weight"] = [weight(each) for each in modules]
            biases = [p for each in modules for p in each.parameters(recurse=False) if p is not weight(each)]
            if biases and name != "lm_head":
                parameters[f"{name}.bias"] = biases
        rows, columns = weight(places["h.0.mlp.c_fc"][0]).shape
        single = {name: modules[0] for name, modules in places.items() if len(modules) == 1}
        pairing = Pairing(ours, parameters, single, rows < columns)
        if all(theirs.shape == part.shape for theirs, part in pairing.pairs()):
            yield pairing
        if not any(len(modules) == 3 for modules in places.values()):
            return


@dataclass(frozen=True)
class Comparison:
    """What two networks with equal weights compute. The errors are relative."""

    pairing: Pairing
    cause: Cause | None  # the change of ours that makes the logits equal, if one is needed and known
    logits: float
    gradient: float  # of the worst parameter
    gradient_of: str

    @property
    def same_function(self) -> bool:
        """Whether the logits are equal, with `cause` if there is one."""
        return self.logits <= LOGITS


def sharpen(ours: GPT) -> None:
    """Fill `ours` with weights that every known cause shows with: step_check's, with a larger c_fc."""
    step_check.sharpen(ours)
    for block in ours.h:  # so large that GELU's formulas differ
        block.get_parameter("mlp.c_fc.weight").data /= step_check.STD * ours.config.n_embd**0.5


def compare(theirs: Theirs, ours: GPT, idx: Tensor, targets: Tensor) -> Comparison | None:
    """Compare both with sharp weights in float32 on idx and targets, int64 (B, T). None: weights cannot be copied.

    If the logits differ, look for a cause that makes ours equal to theirs.
    """
    sharpen(ours)
    outputs = []
    for parameter in theirs.parameters():
        parameter.data.zero_()  # ours has no place for some, such as a head's bias
    for pairing in pairings(theirs.network, ours):
        pairing.copy_weights()
        outputs.append((pairing, theirs(idx)[0].detach()))
    if not outputs:
        return None
    exact = [replace(cause, how=EXACT_GELU.how | cause.how) for cause in CAUSES if "act" not in cause.how]
    equal = (
        (pairing, cause)
        for cause in (None, *CAUSES, *exact)  # the faults of a network with nanoGPT's GELU, too
        for expected in [logits_of(ours, idx, cause)]
        for pairing, logits in outputs
        if error(logits, expected) <= LOGITS
    )
    pairing, cause = next(equal, (outputs[0][0], None))
    pairing.copy_weights()
    (logits, loss), expected = theirs(idx, targets), logits_of(ours, idx, cause)
    our_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)  # 0 where there is none
    gradients = iter(grad(loss, [*chain(*pairing.parameters.values())]))
    needed = grad(our_loss, [ours.get_parameter(name) for name in pairing.parameters])
    errors = {}
    for (name, parts), right in zip(pairing.parameters.items(), needed, strict=True):
        gradient = torch.cat([pairing.laid_out(name, next(gradients)) for _ in parts])
        errors[name] = float(((gradient - right).norm() / right.norm().clamp(min=1e-30)).nan_to_num(torch.inf))
    worst = max(errors, key=errors.__getitem__)
    return Comparison(pairing, cause, error(logits, expected), errors[worst], worst)


def logits_of(ours: GPT, idx: Tensor, cause: Cause | None) -> Tensor:
    """Return the logits of ours, (B, T, V), with the change that `cause` names."""
    return changed(ours, idx, **cause.how) if cause else ours(idx)[0]


@torch.no_grad()
def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value; infinity for another shape or NaN."""
    if actual.numel() != expected.numel():
        return torch.inf
    return float(((actual.view_as(expected) - expected).abs().max() / expected.abs().max()).nan_to_num(torch.inf))


def first_difference(theirs: Theirs, pairing: Pairing, idx: Tensor) -> str:
    """Return where the computations differ first, for idx, int64 (B, T), as the end of a sentence."""
    ours = {name: pairing.ours.get_submodule(name) for name in pairing.modules}
    seen, needed = capture(theirs, pairing.modules, idx), capture(pairing.ours, ours, idx)
    before = ""
    for (name, is_input), expected in needed.items():  # in the order of the computation
        layer, place = (f"layer {name.split('.')[1]}", name.split(".", 2)[2]) if "h." in name else ("the end", name)
        actual, text = seen.get((name, is_input)), POINTS.get(place, ("", ""))[not is_input]
        if text and actual is not None:
            if actual.numel() == expected.numel() and error(actual, expected) > LOGITS:
                return f"in {layer} {before}{text} differs"
            before = f"{text} agrees and "
    return "all layers agree and the logits differ"


@torch.no_grad()
def capture(network: nn.Module, modules: Mapping[str, nn.Module], idx: Tensor) -> dict[tuple[str, bool], Tensor]:
    """Run `network` on idx, int64 (B, T); return the first input (True) and output (False) of each of `modules`."""
    kept: dict[tuple[str, bool], Tensor] = {}

    def keep(name: str, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        for is_input, values in ((True, (*inputs, named)), (False, output)):
            for each in [*tensors(values)][:1]:
                kept.setdefault((name, is_input), each)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(partial(keep, name), with_kwargs=True))
        network(idx)
    return kept
