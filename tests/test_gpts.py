"""The GPTs of experiments/gpts: every planted fault does what its name says, every variant is what it says."""

import ast
import functools
import re
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import gpts

NAMES = sorted(path.stem for path in gpts.FOLDER.glob("*.py") if path.stem != "__init__")
FUNCTION = (
    *("scores_unscaled", "scores_by_width", "mask_missing", "mask_sees_next", "mask_hides_self", "mask_after_softmax"),
    *("softmax_over_queries", "heads_not_merged", "heads_interleaved", "relu", "norm_after", "norm_eps"),
    *("final_norm_missing", "residual_missing", "positions_missing", "positions_shifted", "attention_bias_missing"),
    "rows_mixed",
)
TRAINING = ("init_default", "init_unscaled", "block_detached", "dropout_always", "loss_shifted", "loss_ignores")
UNTIED = ("mingpt",)
LEAKS = {"mask_missing", "mask_sees_next", "mask_after_softmax", "softmax_over_queries", "heads_not_merged"}
B, T, L, H, C, V = 3, 16, 2, 4, 32, 60  # rows, context, layers, heads, width, vocabulary
TOKENS = torch.randint(1, V, (B, T + 1), generator=torch.Generator().manual_seed(0))  # no id 0

pytestmark = pytest.mark.parametrize("name", NAMES)


def variants(name: str) -> list[str]:
    last = "tied" if name in UNTIED else "untied"
    return [f"variant: {variant}" for variant in ("exact_gelu", "no_biases", "padded", last)]


@functools.cache
def sources(name: str) -> dict[str, str]:
    return {"right": (gpts.FOLDER / f"{name}.py").read_text(), **gpts.planted(name)}


def definitions(source: str) -> dict:
    """Run the imports that succeed, the classes, the functions and the constants of a file, and nothing else."""
    names = {"__name__": "definitions"}
    for node in ast.parse(source).body:
        imports = isinstance(node, (ast.Import, ast.ImportFrom))
        constant = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if imports or constant or isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            with suppress(*[ImportError] * imports):
                exec(compile(ast.Module([node], []), "planted", "exec"), names)
    return names


def build(name: str, fault: str) -> nn.Module:
    """Return a small network in float64, with its own random weights and no dropout."""
    made = definitions(sources(name)[fault])
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "vocab_size": V}
    dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    if name == "video":
        model = made["GPT"](made["GPTConfig"](**sizes, block_size=T))
    elif name == "mingpt":
        config = made["GPT"].get_default_config()
        config.merge_from_dict({"model_type": None, **sizes, "block_size": T, **dropout})
        model = made["GPT"](config)
    elif name == "hub":
        model = made["GPT"](made["GPT2Config"](**sizes, n_positions=T, **dropout, bos_token_id=0, eos_token_id=0))
    else:
        model = made["GPT2"](depth=L, width=C, heads=H, context=T, vocabulary=V)
    return model.double().eval()


def run(name: str, model: nn.Module, tokens: Tensor = TOKENS, training: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the logits and, if `training`, the loss."""
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # some networks call targets.view
    if name == "hub":
        out = model(ids, labels=ids) if training else model(ids)
        return out.logits, out.loss
    if name == "paper":
        return model(ids, targets)[::-1] if training else (model(ids), None)
    return model(ids, targets) if training else model(ids)


@torch.no_grad()
def fill(model: nn.Module, std: float) -> dict[str, Tensor]:
    """Draw all parameters from N(0, std), a LayerNorm's gain from N(1, std), and return them."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for name, parameter in sorted(parameters.items()):
        parameter.normal_(1.0 if is_gain(name, parameter) else 0.0, std, generator=generator)
    return parameters


def is_gain(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 1 and name.endswith(("weight", "gain"))


@torch.no_grad()
def pair(name: str, fault: str, std: float = 0.3) -> tuple[nn.Module, nn.Module]:
    """Return the right network and one with a fault, with the same parameters; a mask is no parameter."""
    right, faulty = build(name, "right"), build(name, fault)
    parameters = fill(right, std)
    for key, parameter in faulty.named_parameters():
        parameter.copy_(parameters[key])
    return right, faulty


@torch.no_grad()
def change(name: str, one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of the logits, as a share of the largest logit."""
    logits, changed = run(name, one)[0], run(name, other)[0]
    assert changed.isfinite().all()
    return float((changed - logits).abs().max() / logits.abs().max())


@torch.no_grad()
def moved(name: str, model: nn.Module, tokens: Tensor, row: int, time: int) -> Tensor:
    """Return where logits change, (rows, T), after a change of one token."""
    changed = tokens.clone()
    changed[row, time] = tokens[row, time] % (V - 1) + 1
    return ((run(name, model, tokens)[0] - run(name, model, changed)[0]).abs() > 1e-9).any(-1)


def loss_by_hand(name: str, logits: Tensor, shift: int = 0) -> float:
    counted = T - shift - (name == "hub")  # the hub's networks know no target of the last token
    return F.cross_entropy(logits[:, :counted].mT, TOKENS[:, 1 + shift :][:, :counted]).item()


def test_a_page_has_every_fault_and_variant_once(name):
    page = (gpts.FOLDER / f"{name}.md").read_text()
    assert re.findall("^## (.*)", page, re.MULTILINE) == [*FUNCTION, *TRAINING, *variants(name)]
    assert len(set(sources(name).values())) == 29
    fences = "".join(gpts.FENCE.findall(page))
    assert re.findall(r"^[^-+\n].*", fences, re.MULTILINE) == []
    assert page.count("\n```") == 2 * page.count("\n```diff\n") == 2 * len(gpts.FENCE.findall(page))


def test_old_lines_that_do_not_occur_exactly_once_are_refused(name):
    source = sources(name)["right"]
    for line in ("lost = True", "import torch"):
        text = f"import torch\n{source}"
        with pytest.raises(ValueError, match=r"occurs [02] times"):
            gpts.plant(text, f"```diff\n-{line}\n+pass\n```\n")


def test_every_file_runs_with_and_without_targets_and_right_ones_count_every_target(name):
    for fault in sources(name):
        model = build(name, fault)
        logits, loss = run(name, model)
        trained, trained_loss = run(name, model, training=True)
        assert logits.shape == (B, T, 64 if fault == "variant: padded" else V), fault
        assert loss is None, fault
        assert trained_loss.shape == (), fault
        assert trained_loss.isfinite(), fault
        if fault != "dropout_always":
            assert torch.equal(logits, trained), fault
            by_hand = pytest.approx(loss_by_hand(name, logits), rel=1e-6)  # transformers computes it in float32
            assert (trained_loss.item() == by_hand) == (fault != "loss_shifted"), fault


@pytest.mark.parametrize("fault", FUNCTION)
def test_a_fault_of_the_function_changes_the_logits(name, fault):
    right, faulty = pair(name, fault, std=0.02 if fault == "norm_eps" else 0.3)
    assert change(name, right, faulty) > (1e-6 if fault == "norm_eps" else 1e-4)
    missing = dict(right.named_parameters()).keys() - dict(faulty.named_parameters()).keys()
    biases = {"paper": 3 * L}.get(name, L)
    assert len(missing) == (biases if fault == "attention_bias_missing" else 0)
    assert all(key.endswith("bias") for key in missing)


@pytest.mark.parametrize("fault", ["right", *FUNCTION])
def test_only_the_faults_that_say_so_look_ahead_or_at_other_rows(name, fault):
    model = build(name, fault)
    fill(model, 0.3)
    ahead = [moved(name, model, TOKENS[:1], 0, time)[0, :time].any() for time in range(1, T)]
    assert any(ahead) == (fault in LEAKS)
    rows = [moved(name, model, TOKENS, row, T // 2)[torch.arange(B) != row].any() for row in range(B)]
    assert any(rows) == (fault == "rows_mixed")


@pytest.mark.parametrize("fault", [fault for fault in TRAINING if fault != "dropout_always"])
def test_a_fault_of_training_changes_no_logits(name, fault):
    assert change(name, *pair(name, fault)) == 0


def test_faults_of_the_init_change_the_deviations(name):
    counts = {}
    for fault in ("right", "init_default", "init_unscaled"):
        stds = torch.tensor([p.std().item() for p in build(name, fault).parameters() if p.dim() == 2])
        scaled, unscaled = (stds / 0.01 - 1).abs() < 0.15, (stds / 0.02 - 1).abs() < 0.15
        counts[fault] = (int(scaled.sum()), int(unscaled.sum()), len(stds))
    matrices = counts["right"][2]
    assert counts == {
        "right": (2 * L, matrices - 2 * L, matrices),
        "init_default": (0, 0, matrices),
        "init_unscaled": (0, matrices, matrices),
    }


def test_a_detached_block_gets_no_gradient(name):
    for fault in ("right", "block_detached"):
        model = build(name, fault)
        run(name, model, training=True)[1].backward()
        reached = {0: set(), 1: set()}
        for key, parameter in model.named_parameters():
            if layer := re.search(r"\.(\d+)\.", key):
                gradient = parameter.grad
                reached[int(layer[1])].add(gradient is not None and bool(gradient.any()))
        assert reached == {0: {fault == "right"}, 1: {True}}


def test_a_dropout_acts_although_the_config_has_none(name):
    for fault in ("right", "dropout_always"):
        model = build(name, fault)
        assert (change(name, model, model) > 1e-4) == (fault == "dropout_always")


def test_faults_of_the_loss_leave_out_targets(name):
    right, shifted = pair(name, "loss_shifted")
    logits, loss = run(name, shifted, training=True)
    assert loss.item() == pytest.approx(loss_by_hand(name, logits, shift=1), rel=1e-6)
    ignores = pair(name, "loss_ignores")[1]
    assert torch.equal(run(name, ignores, training=True)[1], run(name, right, training=True)[1])
    tokens = TOKENS.clone()
    tokens[:, T // 2] = 0
    losses = [run(name, model, tokens, training=True)[1] for model in (right, ignores)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_variants_differ_in_what_they_say(name):
    right = build(name, "right")
    exact, no_biases, padded, tying = (build(name, variant) for variant in variants(name))
    parameters, tied = fill(right, 0.3), name not in UNTIED
    with torch.no_grad():
        for key, parameter in exact.named_parameters():
            parameter.copy_(parameters[key])
    assert 1e-6 < change(name, right, exact) < 1e-2
    assert sum(parameter.dim() == 1 for parameter in no_biases.parameters()) == 2 * L + 1
    assert all(is_gain(key, parameter) or parameter.dim() == 2 for key, parameter in no_biases.named_parameters())
    sizes = [sum(p.numel() for p in model.parameters()) for model in (right, padded, tying)]
    assert sizes[1] - sizes[0] == (64 - V) * C * (1 if tied else 2)
    assert sizes[2] - sizes[0] == (V * C if tied else -V * C)
