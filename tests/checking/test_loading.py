"""A user's GPT is loaded without its training, built at any size, and called in one way."""

import sys

import pytest
import torch

from gpt2_ladder.checking import loading
from gpt2_ladder.checking.loading import Theirs
from gpt2_ladder.config import UserError
from helpers import own_gpts
from helpers.common import random_ids, tiny

NETWORK = """
class Net(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
"""
DEFAULTS = """
from dataclasses import dataclass, field
from torch import nn

@dataclass
class Sizes:
    vocab_size: int = 50257
    d_model: int = 768
    betas: list = field(default_factory=list)
"""
NO_DEFAULTS = """
from dataclasses import dataclass
from torch import nn

@dataclass(frozen=True)
class Sizes:
    n_embd: int
    vocab_size: int
    dropout: float
"""
DICTIONARY = """
from torch import nn
GPT_CONFIG_124M = {"vocab_size": 50257, "emb_dim": 768, "n_heads": 12, "drop_rate": 0.1}
"""
LIST = """
import torch
from torch import nn
def make(outputs):
    class Net(nn.Module):
        def forward(self, idx, targets=None):
            return outputs(idx, targets)
    return Net()
"""


def build(path: str, name: str = "Net", **options: object):
    return loading.build(loading.load(f"{path}:{name}"), tiny(), options)


def refused(path: str, name: str = "Net", **options: object) -> str:
    """Return the error of a network that cannot be loaded or built, which is one line."""
    with pytest.raises(UserError) as caught:
        build(path, name, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_the_script_part_of_a_file_is_not_executed(write_gpt, capsys):
    source = own_gpts.sources("video")["right"]  # prints its device, reads input.txt and trains
    assert "\nfor step in range(max_steps):" in source
    module = sys.modules[loading.load(f"{write_gpt(source)}:GPT").__module__]
    assert not {"model", "optimizer", "train_loader", "step"} & vars(module).keys()
    assert (module.device, module.total_batch_size, module.max_lr) == ("cpu", 524288, 6e-4)  # constants are executed
    assert capsys.readouterr().out == ""


def test_a_script_behind_an_if_and_a_call_without_a_name_are_not_executed(write_gpt):
    path = write_gpt(f'{DEFAULTS}{NETWORK}\nif True:\n    raise SystemExit(3)\nprint(1)\n"text"\nexit()\n')
    assert build(path).sizes.vocab_size == 97


def test_an_import_that_fails_is_reported_only_if_the_class_needs_it(write_gpt):
    path = write_gpt(f"import torch\nimport missing_one\nfrom missing_two import reader{DEFAULTS}{NETWORK}")
    assert build(path).sizes.d_model == 16
    annotated = "\ndef read(x: missing_one.Reader) -> missing_two.Text:\n    return Net(x)\n"
    path = write_gpt(f"import missing_one{DEFAULTS}{NETWORK}{annotated}")
    assert loading.load(f"{path}:read")(3).sizes == 3
    base = "\nclass Bad(missing_one.Base):\n    pass\n"
    reason = refused(write_gpt(f"import missing_one{DEFAULTS}{base}"), "Bad")
    line = DEFAULTS.count("\n") + 2
    assert reason == (
        f"NameError in line {line}: name 'missing_one' is not defined "
        "(ModuleNotFoundError in line 1: No module named 'missing_one')"
    )
    path = write_gpt(f"from missing_two import reader{DEFAULTS}{NETWORK}        reader()\n")
    with pytest.raises(NameError) as caught:
        build(path)
    assert loading.explain(caught.value, f"{path}:Net").endswith(
        "name 'reader' is not defined (ModuleNotFoundError in line 1: No module named 'missing_two')"
    )
    reason = refused(write_gpt("from missing_two import Net"))
    assert reason == "ModuleNotFoundError in line 1: No module named 'missing_two'"


def test_the_file_may_import_its_neighbours(write_gpt, tmp_path):
    (tmp_path / "my_neighbour.py").write_text(f"{DEFAULTS}{NETWORK}")
    assert build(write_gpt("from my_neighbour import Net")).sizes.vocab_size == 97


def test_a_constant_with_a_call_is_not_executed_and_the_error_names_its_line(write_gpt, tmp_path):
    marker = tmp_path / "executed"
    source = f"device = open({str(marker)!r}, 'w')\nsizes = 3\ntied: bool = True{DEFAULTS}{NETWORK}        device.x\n"
    path = write_gpt(source)
    with pytest.raises(NameError) as caught:
        build(path)
    assert not marker.exists()
    assert loading.explain(caught.value, f"{path}:Net") == (
        f"NameError in line {source.count(chr(10))}: name 'device' is not defined "
        "(line 1: only imports, classes, functions and constants are executed)"
    )
    assert refused(path, "device").startswith("line 1: only imports")
    assert sys.modules["checked_my_gpt"].tied


def test_the_config_is_a_dataclass_with_or_without_defaults(write_gpt):
    sizes = build(write_gpt(f"{DEFAULTS}{NETWORK}")).sizes
    assert (sizes.vocab_size, sizes.d_model, sizes.betas) == (97, 16, [])
    path = write_gpt(f"{NO_DEFAULTS}{NETWORK}")
    assert vars(build(path, dropout=0.5, vocab_size=7).sizes) == {"n_embd": 16, "vocab_size": 7, "dropout": 0.5}
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'dropout'"):
        build(path)


@pytest.mark.parametrize(
    "config",
    [
        "class Sizes:\n    n_embd, vocab_size = 5, 7\n",
        "class Sizes:\n    def __init__(self, n_embd, vocab_size=7):\n"
        "        self.n_embd, self.vocab_size = n_embd, vocab_size\n",
        "class Train:\n    n_embd = 5\n",  # one size only: not the config, so every name of a size is given
        "from pydantic import BaseModel\nclass Sizes(BaseModel):\n    n_embd: int\n    vocab_size: int = 7\n",
    ],
)
def test_the_config_may_be_any_object_with_the_sizes(config, write_gpt):
    sizes = build(write_gpt(f"from torch import nn\n{config}{NETWORK}")).sizes
    assert (sizes.n_embd, sizes.vocab_size) == (16, 97)


def test_a_config_that_is_the_default_of_the_only_argument_is_changed(write_gpt):
    network = NETWORK.replace("sizes)", "sizes=Sizes())")
    assert network != NETWORK
    assert build(write_gpt(f"{DEFAULTS}{network}")).sizes.d_model == 16


@pytest.mark.parametrize(
    ("default", "imported"),
    [
        ("{'vocab': 7, 'dim': 5, 'rate': 0.1}", ""),
        ("SimpleNamespace(dim=5, rate=0.1)", "from types import SimpleNamespace"),
    ],
)
def test_a_default_config_that_no_name_of_the_file_has_keeps_its_other_values(default, imported, write_gpt):
    network = NETWORK.replace("sizes)", f"sizes={default})", 1)
    sizes = build(write_gpt(f"from torch import nn\n{imported}\n{network}")).sizes
    assert (sizes if isinstance(sizes, dict) else vars(sizes)).items() >= {("dim", 16), ("rate", 0.1)}


def test_values_that_a_config_class_sets_itself_can_be_changed(write_gpt):
    values = (
        "class Sizes:\n    n_embd, vocab_size, bias = 5, 7, True\n    def __init__(self):\n        self.dropout = 0.1\n"
    )
    path = write_gpt(f"from torch import nn\n{values}{NETWORK}")
    sizes = build(path, bias=False, dropout=0.0).sizes
    assert (sizes.n_embd, sizes.bias, sizes.dropout) == (16, False, 0.0)
    with pytest.raises(UserError, match="--config rate: Net only has bias, dropout"):
        build(path, rate=0.1)


def test_sizes_in_the_body_of_the_network_itself_stay(write_gpt):
    path = write_gpt(
        f"from torch import nn\n{NETWORK.replace(', sizes', '').replace('= sizes', '= 0')}    n_embd, n_layer = 5, 7\n"
    )
    assert (build(path).n_embd, build(path).n_layer) == (5, 7)


def test_names_of_a_script_that_is_not_executed_are_no_config(write_gpt):
    script = "model = Net(dict(vocab_size=vocab_size, n_embd=n_embd))\n"
    assert build(write_gpt(f"from torch import nn\n{NETWORK}        sizes.n_layer\n{script}")).sizes.n_layer == 2


def test_a_constant_may_ask_for_the_device(write_gpt):
    device = "import torch\ndevice = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
    assert build(write_gpt(f"{device}{DEFAULTS}{NETWORK}        device\n")).sizes.d_model == 16


def test_what_a_config_derives_from_its_sizes_is_right(write_gpt):
    post = "    def __post_init__(self):\n        self.rows = 4 * self.d_model\n"
    assert build(write_gpt(f"{DEFAULTS}{post}{NETWORK}")).sizes.rows == 64
    init = "    def __init__(self, n_embd=5, vocab_size=7):\n        self.rows = 4 * n_embd\n"
    assert build(write_gpt(f"from torch import nn\nclass Sizes:\n{init}{NETWORK}")).sizes.rows == 64


def test_the_annotated_dataclass_is_taken_and_not_the_first(write_gpt):
    source = f"{DEFAULTS}\n@dataclass\nclass Other:\n    n_embd: int = 5\n    vocab: int = 4\n{NETWORK}"
    for annotation in ("Other", "'Other'"):
        sizes = build(write_gpt(source.replace("(self, sizes)", f"(self, sizes: {annotation})"))).sizes
        assert (type(sizes).__name__, sizes.n_embd, sizes.vocab) == ("Other", 16, 97)


def test_the_config_is_a_dictionary_which_stays_as_it_is(write_gpt):
    path = write_gpt(f"{DICTIONARY}{NETWORK}")
    assert build(path, drop_rate=0.0).sizes == {"vocab_size": 97, "emb_dim": 16, "n_heads": 2, "drop_rate": 0.0}
    assert sys.modules["checked_my_gpt"].GPT_CONFIG_124M["emb_dim"] == 768


def test_a_config_that_only_the_files_script_makes_is_read_by_key_or_by_attribute(write_gpt):
    path = write_gpt(f"{LIST.splitlines()[2]}\n{NETWORK}        self.depth = sizes['n_layers'], sizes.n_layer\n")
    assert build(path).depth == (2, 2)
    path = write_gpt(f"{LIST.splitlines()[2]}\n{NETWORK}        self.rate = sizes['drop_rate']\n")
    with pytest.raises(AttributeError, match="no attribute 'drop_rate'"):  # the command adds: --config sets it
        build(path)
    assert build(path, drop_rate=0.5).rate == 0.5


def test_the_sizes_are_keyword_arguments_of_a_class_or_a_function(write_gpt):
    source = """
from torch import nn
class Net(nn.Module):
    def __init__(self, depth: int, width=768, *, vocabulary=50257, dropout=0.1, **unused):
        super().__init__()
        self.sizes = depth, width, vocabulary, dropout
def make(n_layer=1, n_embd=2):
    return Net(n_layer, n_embd)
"""
    path = write_gpt(source)
    assert build(path).sizes == (2, 16, 97, 0.1)
    assert build(path, vocabulary=5, dropout=0.0).sizes == (2, 16, 5, 0.0)
    assert build(path, "make").sizes == (2, 16, 50257, 0.1)


def test_mingpts_default_config_and_the_hubs_config_class_take_the_sizes(write_gpt):
    network = own_gpts.build(write_gpt, "mingpt", tiny()).network
    assert network.transformer.wpe.weight.shape == (32, 16)
    factory = loading.load("transformers:GPT2LMHeadModel")
    assert loading.build(factory, tiny(), {**own_gpts.options("hub", 97), "hidden_size": 32}).config.n_embd == 32
    network = loading.build(factory, tiny(), own_gpts.options("hub", 97))
    assert (network.config.n_positions, network.config.n_layer, network.config.use_cache) == (32, 2, False)
    assert Theirs(network).target_name == "labels"
    derived = {"num_layers": 2, "attention_types": [[["global"], 2]], "attention_layers": ["global", "global"]}
    network = loading.build(loading.load("transformers:GPTNeoForCausalLM"), tiny(), derived)
    assert network.config.attention_layers == ["global", "global"]  # its constructor does not take them


@pytest.mark.parametrize(("default", "built"), [(128, 128), (97, 97), (96, 97), (97 + 1024, 97), ("None", 97)])
def test_a_vocabulary_that_is_padded_by_default_stays_so(write_gpt, default, built):
    path = write_gpt(f"{DEFAULTS.replace('50257', str(default))}{NETWORK}")
    assert build(path).sizes.vocab_size == built
    assert build(path, vocab_size=200).sizes.vocab_size == 200


def test_a_size_among_the_options_is_ours_too():
    config = loading.with_options(tiny(), {"d_model": 32, "block_size": 8, "dropout": 0.1})
    assert config == tiny(n_embd=32, n_positions=8)


def test_what_cannot_be_loaded_is_explained_in_one_line(write_gpt, tmp_path):
    path = write_gpt(f"{DEFAULTS}{NETWORK}\ndef three():\n    return 3\n")
    assert refused(path, nothing=1) == "--config nothing: Net only has betas, d_model, vocab_size"
    assert refused(path, "GPT") == f"{path} has no class or function GPT"
    assert refused(path, "three") == "three returns int, not a torch.nn.Module"
    for name in (path, "my_gpt.py:", ":GPT", "my_gpt.py:GPT()", "GPT"):
        with pytest.raises(UserError, match=r"give a file or module and its class, such as my_gpt\.py:GPT"):
            loading.load(name)
    assert refused(str(tmp_path / "no.py")).startswith("cannot be read: [Errno 2] No such file")
    assert refused("no_such_module") == "cannot be read: No module named 'no_such_module'"
    assert refused("json") == "json has no class or function Net"
    for content, words in ((b"def f(:", "invalid syntax"), (b"\xff\xfe", "can't decode"), (b"x = '\0'", "null bytes")):
        (tmp_path / "my_gpt.py").write_bytes(content)
        assert words in refused(path)


OUTPUTS = {
    "a tensor": lambda logits, loss: logits,
    "a pair": lambda logits, loss: (logits, loss),
    "the loss first": lambda logits, loss: (loss, logits),
    "a dictionary": lambda logits, loss: {"loss": loss, "logits": logits},
    "a dictionary of its own": lambda logits, loss: type("Out", (dict,), {})(loss=loss, logits=logits),
    "a list with the ids": lambda logits, loss: [torch.zeros(2, 16, dtype=torch.long), [logits]],
    "rows of tokens": lambda logits, loss: (logits.flatten(0, 1), loss),
    "with hidden states behind": lambda logits, loss: (loss, logits, torch.zeros(2, 16, 4)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_and_loss_are_found_in_what_forward_returns(kind):
    logits = torch.randn(2, 16, 97)

    class Net(torch.nn.Module):
        def forward(self, idx, y=None):
            assert y is not None  # in every call, because nanoGPT returns all logits only with targets
            return OUTPUTS[kind](logits, torch.tensor(7.0))

    theirs = Theirs(Net())
    found, loss = theirs.outputs(random_ids(), random_ids())
    assert torch.equal(found, logits)
    assert loss is None if kind in ("a tensor", "a list with the ids") else loss == 7
    assert torch.equal(theirs(random_ids())[0], logits)
    by_hand = torch.nn.functional.cross_entropy(logits.mT, random_ids())
    assert theirs(random_ids(), random_ids())[1] == pytest.approx(by_hand.item())
    theirs.own_loss = True
    assert theirs(random_ids(), random_ids())[1] == loss


@pytest.mark.parametrize(
    ("output", "shown"), [((torch.zeros(2, 1, 97), None), r"\(2, 1, 97\)"), (torch.arange(3), "no tensor")]
)
def test_a_forward_without_logits_is_refused_with_the_shapes_that_it_returns(output, shown):
    network = torch.nn.Module()
    network.forward = lambda idx: output
    with pytest.raises(UserError, match=rf"forward returns {shown} for ids \(2, 16\); logits are \(B, T, V\)"):
        Theirs(network)(random_ids())
