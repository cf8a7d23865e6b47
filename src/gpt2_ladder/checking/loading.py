"""Load the user's own GPT: run the part of a file that defines it, build it at any size, and call it in one way."""

import __future__

import ast
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass, replace
from inspect import Parameter, isclass, signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_ladder.config import GPTConfig, UserError

Factory = Callable[..., Any]
NAMES = {  # of the sizes in people's configs, by our name
    "n_layer": ("n_layer", "n_layers", "num_layers", "num_hidden_layers", "depth", "layers"),
    "n_head": ("n_head", "n_heads", "num_heads", "num_attention_heads", "heads", "nhead"),
    "n_embd": ("n_embd", "d_model", "emb_dim", "embed_dim", "hidden_size", "width", "dim"),
    "n_positions": ("n_positions", "block_size", "context_length", "max_seq_len", "max_len", "n_ctx", "context"),
    "vocab_size": ("vocab_size", "vocabulary_size", "n_vocab", "vocabulary", "vocab"),
}
OURS = {theirs: ours for ours, names in NAMES.items() for theirs in names}
TARGETS = ("targets", "labels", "target", "tgt", "y")
HARMLESS = {"torch.cuda.is_available", "torch.device", "len", "int", "str"}  # calls that a constant may have
KEPT = ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef
MISSING = "_missing"  # of the module of a checked file


class Sizes(SimpleNamespace):
    """The config of a network whose own is not found, read by attribute or, as a dictionary, by key."""

    __getitem__ = SimpleNamespace.__getattribute__


def load(name: str) -> Factory:
    """Return the class or function `name`, FILE:CLASS or MODULE:CLASS; raise UserError if it cannot be loaded."""
    where, _, attribute = name.rpartition(":")
    if not where or not attribute.isidentifier():
        raise UserError("give a file or module and its class, such as my_gpt.py:GPT")
    try:
        module = define(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (OSError, SyntaxError, ValueError, ImportError) as error:
        raise UserError(f"cannot be read: {error}") from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise UserError(getattr(module, MISSING, {}).get(attribute, f"{where} has no class or function {attribute}"))
    return factory


def define(path: Path) -> ModuleType:
    """Execute the imports, classes, functions and constants of the file at `path`, so that no training starts.

    The module's MISSING has the reason, by name, why something is not defined.
    """
    module = sys.modules[f"checked_{path.stem}"] = ModuleType(f"checked_{path.stem}")
    missing: dict[str, str] = {}
    vars(module).update({"__file__": str(path), MISSING: missing})
    sys.path.insert(0, str(path.resolve().parent))
    for node in ast.parse(path.read_text(), str(path)).body:
        calls = {ast.unparse(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)} - HARMLESS
        try:
            if not isinstance(node, KEPT) and not (isinstance(node, ast.Assign | ast.AnnAssign) and not calls):
                raise UserError("only imports, classes, functions and constants are executed")
            flags = __future__.annotations.compiler_flag  # an annotation may need what is missing
            exec(compile(ast.Module([node], []), str(path), "exec", flags), vars(module))
        except (Exception, SystemExit) as error:
            names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
            names += [each.asname or each.name for each in ast.walk(node) if isinstance(each, ast.alias)]
            reason = f"line {node.lineno}: {error}" if isinstance(error, UserError) else explain(error, f"{path}:")
            for name in (*names, getattr(node, "name", "")):
                missing.setdefault(name, reason)
    return module


def explain(error: BaseException, name: str) -> str:
    """Return `error` in one line, with its line in the file of FILE:CLASS and, for an unknown name, the reason."""
    path = Path(name.rpartition(":")[0])
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == str(path)]
    where = f" in line {lines[-1]}" if lines else ""
    missing = getattr(sys.modules.get(f"checked_{path.stem}"), MISSING, {})
    reason = f" ({missing[error.name]})" if isinstance(error, NameError) and error.name in missing else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split()):.300}{reason}"


def with_options(config: GPTConfig, options: Mapping[str, Any]) -> GPTConfig:
    """Return `config` with those sizes that `options`, in people's names, have."""
    return config.with_values({OURS[name]: value for name, value in options.items() if name in OURS})


def build(factory: Factory, config: GPTConfig, options: Mapping[str, Any]) -> nn.Module:
    """Return the network that `factory` builds with the sizes of `config`, and `options`, which are in its own names.

    A vocabulary that is padded by default stays so. Raise UserError if `factory` cannot take them.
    """
    own, defaults = find_config(factory, config, options)
    if unknown := sorted(options.keys() - defaults.keys()):
        raise UserError(f"--config {unknown[0]}: {factory.__name__} only has {', '.join(sorted(defaults)):.300}")
    values = {name: getattr(config, OURS[name]) for name in defaults if name in OURS} | dict(options)
    for name in (values.keys() & NAMES["vocab_size"]) - options.keys():
        if isinstance(default := defaults[name], int) and 0 < default - config.vocab_size < 1024:
            values[name] = default
    network = factory(**values) if own is None else factory(_changed(own, values))
    if not isinstance(network, nn.Module):
        raise UserError(f"{factory.__name__} returns {type(network).__name__}, not a torch.nn.Module")
    return network


def find_config(factory: Any, config: GPTConfig, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the config that `factory` takes and its settings by name, or None and the arguments of `factory`."""
    arguments = [each for each in signature(factory).parameters.values() if each.kind != Parameter.VAR_KEYWORD]
    required = [each for each in arguments if each.default is Parameter.empty] or arguments
    names = {name: value for name, value in vars(sys.modules[factory.__module__]).items() if name != MISSING}
    if hasattr(factory, "get_default_config"):  # minGPT's, whose model_type excludes sizes
        own = factory.get_default_config()
        own.model_type = None
    elif hasattr(factory, "config_class"):  # transformers'
        own = factory.config_class(use_cache=False)
    elif len(required) != 1 or required[0].name in OURS:
        return None, {each.name: each.default for each in arguments}
    else:
        taken = required[0]
        named = taken.annotation if isclass(taken.annotation) else names.get(str(taken.annotation).strip("'\""))
        found = [own for kind in (named, *names.values()) if (own := _instance(kind, config, options)) is not None]
        everything = Sizes(**{name: getattr(config, OURS[name]) for name in OURS} | dict(options))
        own = (found + ([] if taken.default in (Parameter.empty, None) else [taken.default]) + [everything])[0]
    if isinstance(own, dict):
        return own, own
    settings = {name for name in {*vars(type(own)), *vars(own), *OURS} if name[0] != "_" and hasattr(own, name)}
    return own, {name: getattr(own, name) for name in settings}


def _instance(kind: Any, config: GPTConfig, options: Mapping[str, Any]) -> Any:
    """Return the config that `kind` is, a dictionary, or that it makes, a class; None if it has no sizes."""
    if isinstance(kind, dict):
        return dict(kind) if len(OURS.keys() & kind.keys()) > 1 else None
    known: Mapping[str, Parameter] = {}
    with suppress(TypeError, ValueError):  # some classes have no signature
        known = signature(kind).parameters
    if not isclass(kind) or issubclass(kind, nn.Module) or len(OURS.keys() & {*known, *vars(kind)}) < 2:
        return None
    needed = [name for name, each in known.items() if each.default is Parameter.empty]
    # of the vocabulary, the default may be padded
    taken = [name for name in known if name in OURS and (OURS[name] != "vocab_size" or name in needed)]
    sizes = {name: getattr(config, OURS[name]) for name in taken}
    return kind(**sizes | {name: value for name, value in options.items() if name in known})


def _changed(config: Any, values: Mapping[str, Any]) -> Any:
    """Return `config`, a dataclass, dictionary or other object, with `values`."""
    if is_dataclass(config):
        return replace(config, **values)  # type: ignore[type-var]  # mypy knows no type for people's dataclasses
    for name, value in values.items():
        config.__setitem__(name, value) if isinstance(config, dict) else setattr(config, name, value)
    return config


class Theirs(nn.Module):
    """A user's network, called as our GPT: forward(idx, targets=None) -> (logits, loss).

    Unless `own_loss` is set, the loss is the cross-entropy of its logits, because networks count it differently.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.own_loss = network, False
        names = [*signature(network.forward).parameters][1:]
        self.target_name = next((name for name in TARGETS if name in names), None)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict as GPT.forward does; `idx` and `targets` are int64 (B, T)."""
        logits, loss = self.outputs(idx, targets)
        if targets is not None and not self.own_loss:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    def outputs(self, idx: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the logits, (B, T, V), and the network's own loss, or None if it returns none.

        It always gets targets, because without them nanoGPT's returns only the last position, and some fail.
        """
        named = {self.target_name: idx if targets is None else targets} if self.target_name else {}
        outputs = [*tensors(self.network(idx, **named))]
        if named and all(each.dim() == 0 for each in outputs):  # some return only the loss
            outputs += tensors(self.network(idx))
        shapes = [*idx.shape], [idx.numel()]  # some return (B * T, V)
        logits = next((each for each in outputs if [*each.shape[:-1]] in shapes and each.dim() > 1), None)
        if logits is None:
            returned = ", ".join(str(tuple(each.shape)) for each in outputs) or "no tensor"
            raise UserError(f"forward returns {returned:.200} for ids {tuple(idx.shape)}; logits are (B, T, V)")
        return logits.view(*idx.shape, -1), next((each for each in outputs if each.dim() == 0), None)


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a network's output."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping):
        yield from tensors([*output.values()])
    elif isinstance(output, list | tuple):
        for each in output:
            yield from tensors(each)
