"""params.yaml: valid settings load, and each mistake is reported in one line with its place."""

import itertools
import json
from pathlib import Path

import pytest

from gpt2_ladder import config, params_yaml
from gpt2_ladder.config import Switches, UserError
from gpt2_ladder.params import Params
from helpers import processes
from helpers.common import REPOSITORY

PARAMS = REPOSITORY / "params.yaml"


def line_of(text: str) -> int:
    """Return the number of the line of params.yaml in which `text` occurs first."""
    return PARAMS.read_text().split(text)[0].count("\n") + 1


def load_with(tmp_path: Path, *changes: tuple[str, str]) -> Params:
    """Load params.yaml with the first occurrence of each old text replaced by the new one."""
    text = PARAMS.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "params.yaml").write_text(text)
    return params_yaml.load(tmp_path / "params.yaml")


def test_the_trials_own_settings_replace_those_of_the_levels(tmp_path):
    plain = params_yaml.load(PARAMS)
    assert plain.for_trial() == plain
    own = {"model": "small", "batch_size": 6, "block_size": 64, "steps": 1, "learning_rate": 0.5, "betas": (0.9, 0.5)}
    own |= {"weight_decay": 0.0, "shuffle": True}
    document = plain.model_dump()
    trial = Params.model_validate(document | {"recipe": document["recipe"] | own}).for_trial()
    shape = {"batch_size": 6, "block_size": 64, "steps": 1, "warmup_steps": 0, "eval_tokens": 3840}
    assert trial.shape("speed").model_dump() == shape
    assert (trial.model, trial.size.n_layer, trial.size.n_positions, trial.size.learning_rate) == ("small", 4, 64, 0.5)
    assert trial.optimizer == config.AdamW(betas=(0.9, 0.5), eps=1e-8, weight_decay=0.0)
    assert (trial.data.shuffle, plain.data.shuffle) == (True, False)


def test_openais_weights_are_refused_for_a_size_that_is_not_downloaded(tmp_path):
    with pytest.raises(UserError, match=r"recipe.start = openai: only the weights of model gpt2 are downloaded; leave"):
        load_with(tmp_path, ("  model:    ", "  model: tiny #"), ("  start:    ", "  start: openai #"))


def test_the_ladder_has_its_fourteen_levels_in_order():
    levels = params_yaml.load(PARAMS).levels
    seed = ["untied", "tied", "init", "fp32", "tf32", "bf16", "compile", "flash", "padded"]
    added = ["fused", "allocator", "autotune", "cuda_graphs", "chunked"]
    assert list(levels)[:14] == seed + added  # your own levels come after them
    assert [levels[name].group for name in seed] == ["quality"] * 3 + ["speed"] * 6
    off = {"fused_adamw": False, "chunked_loss": False, "allocator": "system", "autotune": False, "cuda_graphs": False}
    assert all(levels[name].model_dump(include=set(off)) == off for name in seed)


def test_a_level_differs_from_the_one_above_in_at_most_one_switch():
    levels = params_yaml.load(PARAMS).levels
    for (above, a), (below, b) in itertools.pairwise(levels.items()):
        changed = [name for name in Switches.model_fields if getattr(a, name) != getattr(b, name)]
        assert len(changed) == (0 if below == "fp32" else 1), f"{above} -> {below}: {changed}"


def test_the_trial_starts_from_the_fp32_level():
    params = params_yaml.load(PARAMS)
    assert params.switches.model_dump() == params.levels["fp32"].model_dump(exclude={"group"})


def test_a_row_may_leave_every_key_to_the_defaults(tmp_path):
    params = load_with(tmp_path, ("  fp32: {}", "  fp32:"), ("  group: speed", "  group: speed\n  # a comment"))
    assert params.levels["fp32"] == params.defaults == params_yaml.load(PARAMS).defaults


def test_a_mistake_in_the_defaults_is_reported_once(tmp_path):
    with pytest.raises(UserError) as caught:
        load_with(tmp_path, ("  group: speed", "  group: sped\n  speling: 1"))
    group, speling = str(caught.value).splitlines()
    assert ": defaults.group = 'sped': Input should be" in group
    assert ": defaults.speling: unknown key" in speling


def test_every_switch_of_the_network_reaches_its_config(tmp_path):
    params = load_with(tmp_path, ("    attention: flash", "    attention: flash\n    chunked_loss: true"))
    shared = set(Switches.model_fields) & set(config.GPTConfig.model_fields)
    assert {"attention", "chunked_loss", "vocab_size"} < shared
    for level in params.levels.values():
        assert params.gpt(level).model_dump(include=shared) == level.model_dump(include=shared)


def test_exponents_without_a_point_are_numbers():
    params = params_yaml.load(PARAMS)
    assert params.models["gpt2"].learning_rate == 3e-4
    assert params.optimizer.betas == (0.9, 0.999)


def test_only_speed_levels_use_the_shape_of_the_machine(tmp_path):
    params = load_with(tmp_path, ("machine: cpu", "machine: gpu"))
    assert params.shape("speed") == params.machines["gpu"]
    assert params.shape("quality") == params.quality


@pytest.mark.parametrize(
    ("old", "new", "message"),  # {} is the file and the line of `old`
    [
        ("precision: fp32", "precison: fp32", "{}: precison: unknown key; did you mean 'precision'?"),
        ("  gpt2-xl:", "  gpt3:", "models.gpt3: unknown key; known here: 'gpt2', 'gpt2-medium'"),
        ("peak_tflops:", "peak_tflops:\n  fp8: 1", "peak_tflops.fp8: unknown key; known here: 'fp32', 'tf32', 'bf16'"),
        ("precision: fp32", "precision: bf32", "precision = 'bf32': Input should be 'fp32', 'tf32', 'bf16' or "),
        ("half: auto", "half: fp32", "{}: half = 'fp32': Input should be 'bf16', 'fp16' or 'auto'"),
        ("seed: 1337", "seed: '1337'", "{}: seed = '1337': Input should be a valid integer"),
        ("seed: 1337", "", "seed: this key is missing"),
        ("path: data/input.txt", "path: ''", "data.path = '': String should have at least 1 character"),
        ("seed: 1337", "seed: 1337\nseed: 1", "not valid YAML: found duplicate key"),
        ("compile: false", "compile: 1", "compile = 1: Input should be a valid boolean"),
        ("vocab_size: 50257", "vocab_size: 50000", "vocab_size = 50000: Input should be greater than or equal to"),
        ("  fp32: {}", "  fp.32: {}", "levels.fp.32 = 'fp.32': String should match pattern"),
        ("  tf32:\n    p", "  control:\n    p", "levels.control = control: the benchmark uses this name"),
        ("    rounds: 8\n", "    rounds: 5\n", "benchmark.cpu.rounds = 5: Input should be greater than or equal to 6"),
        ("  fp32: {}", "  base: {}", "levels.fp32 = None: the trial is compared with this level; keep its row"),
        (
            "    seconds: 60\n",
            "    seconds: -1\n",
            "trial.cpu.seconds = -1: Input should be greater than or equal to 0",
        ),
        ("  tied:\n", "  tied: &row\n", "{}: YAML anchor or alias 'row': write the values out"),
        ("  betas:\n  - 0.9\n  - 0.999\n", "  betas:\n    a: 0.9\n", "optimizer.betas"),
        ("machines:  ", "machines: []\nrest:  ", "machines = []: Input should be a valid dictionary"),
        ("n_embd: 768", "n_embd: 770", "{}: models.gpt2.n_embd = 770: must be a multiple of n_head (12)"),
        ("block_size: 256", "block_size: 2048", "{}: machines.cpu.block_size = 2048: must be at most models.gpt2.n_po"),
        ("warmup_steps: 2\n", "warmup_steps: 10\n", "{}: machines.cpu.warmup_steps = 10: must be below steps (10)"),
        (
            "tokens_per_step: ",
            "tokens_per_step: 500 ",
            "recipe.tokens_per_step = 500: must be a multiple of the trial's ",
        ),
        ("  block_size:\n", "  block_size: 2048\n", "{}: recipe.block_size = 2048: must be at most models.gpt2.n_pos"),
        ("  minutes:  ", "  minutes: 0 ", "{}: recipe.minutes = 0: Input should be greater than 0"),
        ("  model:   ", "  model: huge ", "{}: recipe.model = 'huge': Input should be 'gpt2', 'gpt2-medium'"),
        ("lr_warmup_steps: 0", "lr_warmup_steps: 10", "recipe.lr_warmup_steps = 10: must be below the trial's steps"),
        ("learning_rate: 3e-4", "learning_rate: .inf", "models.gpt2.learning_rate = inf: Input should be a finite"),
        ("  - 0.9\n", "  - .nan\n", "optimizer.betas.0 = nan: Input should be a finite number"),
        ("steps: 10\n", "steps: 10000000000000000000\n", "Input should be less than 9223372036854775808"),
        ("n_layer: 12", "n_layer: 1000000000", "models.gpt2.n_layer = 1000000000: Input should be less than or equal"),
        ("tokens_per_step: ", "tokens_per_step: 512000000000000 ", "Input should be less than or equal to 134217728"),
        ("    precision: tf32", "    precison: tf32", "levels.tf32.precison: unknown key; did you mean 'precision'?"),
        (
            "    precision: tf32",
            "    precision: tf23",
            "levels.tf32.precision = 'tf23': Input should be 'fp32', 'tf32'",
        ),
        ("  fp32: {}", "  fp32: 5", "levels.fp32 = 5: Input should be a valid dictionary"),
        ("defaults:", "default:", "defaults: this key is missing"),
        ("autotune: false  #", "autotune: true  #", "{}: autotune = true: needs a compiled network: compile: true"),
        ("  fp32: {}", "  fp32:\n    cuda_graphs: true", "levels.fp32.cuda_graphs = true: needs a compiled network"),
        ("seed: 1337", "seed: " + "9" * 5000, "{}: '99999999999999999999'... is longer than 1000 characters"),
        ("seed: 1337", "seed: " + "[" * 1500, "{}: maps and lists are nested more than 8 deep"),  # overflowed the stack
        ("seed: 1337", "seed: [" + "1," * 1000 + "1]", "{}: seed = [1, 1, 1"),
        ("seed: 1337", "seed: !!int x", "{}: '<<', '!' and '%YAML' are not supported"),
        ("seed: 1337", "seed: 1\n<<: {a: 1}", "'<<', '!' and '%YAML' are not supported"),
        ("seed: 1337", "seed: 1\n'[key]': 1", ": [key]: unknown key"),  # pydantic's own name for a wrong key
        ("seed: 1337", "seed: 2001-99-99", "not valid YAML: month must be in 1..12"),
        ("seed: 1337", 'seed: 1\n"\\e[2J\\n": 1', r": \x1b[2J\n: unknown key"),
        ("eval_tokens: 32768", "eval_tokens: 32000", "{}: machines.gpu.eval_tokens = 32000: must be a multiple"),
    ],
)
def test_a_mistake_is_reported_with_its_place_and_what_is_allowed(tmp_path, old, new, message):
    with pytest.raises(UserError) as caught:
        load_with(tmp_path, (old, new))
    message = message.replace("{}", f"params.yaml:{line_of(old)}", 1) if message.startswith("{}") else message
    assert any(message in line and "params.yaml" in line for line in str(caught.value).splitlines()), caught.value


@pytest.mark.parametrize("content", [b"", b"- a list", b"a: b: c", b"a: \x07", b"a: \xff"])
def test_a_file_that_is_not_a_yaml_map_is_refused(tmp_path, content):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"params\.yaml"):
        params_yaml.load(tmp_path / "params.yaml")


def test_activation_checkpointing_belongs_to_a_size_and_acts_at_all_levels(tmp_path):
    for model, expected in (("gpt2-xl", True), ("gpt2", False)):
        params = load_with(tmp_path, ("model: gpt2 ", f"model: {model} "))
        assert {params.gpt(level).activation_checkpointing for level in params.levels.values()} == {expected}


def test_openai_weights_are_refused_for_a_size_without_any(tmp_path):
    message = f"params.yaml:{line_of('source: auto')}: pretrained.source = openai: there are no weights for model tiny"
    with pytest.raises(UserError, match=message):
        load_with(tmp_path, ("model: gpt2 ", "model: tiny "), ("source: auto", "source: openai"))


@pytest.mark.parametrize("other", [("source: auto", "source: stand-in"), ("model: gpt2 ", "model: tiny ")])
@pytest.mark.parametrize(("folder", "shown"), [("here", "here"), ("''", "")])
def test_a_folder_of_weights_that_would_not_be_read_is_refused(tmp_path, other, folder, shown):
    message = f"params.yaml:{line_of('folder:  ')}: pretrained.folder = {shown}: this source and model"
    with pytest.raises(UserError, match=message):
        load_with(tmp_path, ("folder:  ", f"folder: {folder}  "), other)


def test_the_schema_for_editors_is_current():
    assert json.loads((REPOSITORY / "params.schema.json").read_text()) == Params.model_json_schema()
    first_line = PARAMS.read_text().splitlines()[0]
    assert first_line == "# yaml-language-server: $schema=params.schema.json"


def test_reading_the_settings_does_not_import_torch():
    code = "import sys, gpt2_ladder.config, pipeline.environment; print('torch' in sys.modules)"
    assert processes.run(code) == "False\n"
