"""load_packed on modules of one's own: shared layers, prefixes, and what does not fit."""

import pytest
import torch
from sentence import assert_one_sentence
from tiny import write_json, write_shards
from torch import nn

from torch_q4metal import load_packed, reference
from torch_q4metal.errors import CheckpointError, Q4MetalError


def refusal(action, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        action()
    assert_one_sentence(caught.value, *words)


class Net(nn.Module):
    """A body whose one layer occurs twice, and a head tied by sharing its parameter."""

    def __init__(self, table=None):
        super().__init__()
        self.embed = table or nn.Embedding(40, 64)
        self.first = nn.Linear(64, 64, bias=True)
        self.second = self.first
        self.output = nn.Linear(64, 40, bias=False)
        self.output.weight = self.embed.weight
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        return self.output(self.second(self.first(self.embed(ids))) * self.gain)


def write_net(path, **changes):
    """The checkpoint of a Net under ``net.``; ``changes`` replace or (None) remove tensors."""
    path.mkdir(exist_ok=True)
    tensors = {"mask": torch.tensor([True, False, True]), "gain": torch.full((1,), 2.0)}
    tensors["first.bias"] = torch.randn(64)
    for name, rows in (("embed", 40), ("first", 64)):
        packed = reference.quantize(torch.randn(rows, 64), 32, 4)
        tensors |= {f"{name}.{k}": t for k, t in zip(("weight", "scales", "biases"), packed)}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    named = {f"net.{name}": tensor for name, tensor in tensors.items() if tensor is not None}
    write_shards(path, named | {"other.weight": torch.zeros(2)})
    write_json(
        path / "config.json",
        {"model_type": "net", "quantization": {"bits": 4, "group_size": 32}},
    )
    return named


def test_any_module_with_a_prefix(tmp_path):
    tensors = write_net(tmp_path)
    with torch.device("meta"):
        net = Net()
    load_packed(net, tmp_path, prefix="net.", precision="exact")
    assert net.first is net.second
    assert net.mask.tolist() == [True, False, True]
    table, w = (
        reference.dequantize(
            *(tensors[f"net.{name}.{k}"] for k in ("weight", "scales", "biases")), 32, 4
        )
        for name in ("embed", "first")
    )
    ids = torch.tensor([3, 39])
    x = table[ids]
    for _ in range(2):
        x = x @ w.T + tensors["net.first.bias"]
    torch.testing.assert_close(net(ids), x * 2.0 @ table.T, rtol=1e-5, atol=1e-3)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), net(ids))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(2), persistent=False)


def with_part(**parts):
    def make():
        net = Net()
        for name, part in parts.items():
            setattr(net, name, part())
        return net

    return make


def limited_net():
    return Net(nn.Embedding(40, 64, max_norm=1.0))


NET_FAULTS = {
    "missing parameter": (Net, {"gain": None}, ["net.gain"]),
    "missing buffer": (Net, {"mask": None}, ["net.mask"]),
    "missing packed weight": (Net, {"first__weight": None}, ["net.first.weight"]),
    "missing scales": (Net, {"first__scales": None}, ["net.first.scales"]),
    "missing biases": (Net, {"first__biases": None}, ["net.first.biases"]),
    "missing bias": (Net, {"first__bias": None}, ["net.first.bias"]),
    "shape of a parameter": (Net, {"gain": torch.zeros(2)}, ["net.gain", "[2]", "[1]"]),
    "shape of a bias": (Net, {"first__bias": torch.zeros(63)}, ["net.first.bias", "[63]", "[64]"]),
    "dtype of a parameter": (Net, {"gain": torch.zeros(1).long()}, ["net.gain", "I64", "BF16"]),
    "dtype of a buffer": (Net, {"mask": torch.zeros(3)}, ["net.mask", "F32", "BOOL"]),
    "more rows than the module": (
        with_part(first=lambda: nn.Linear(64, 32), second=nn.Identity),
        {},
        ["net.first.weight", "64 rows", "32 x 64"],
    ),
    "other columns than the module": (
        with_part(first=lambda: nn.Linear(512, 64), second=nn.Identity),
        {},
        ["net.first.weight", "512 input features"],
    ),
    "bias without a place": (
        with_part(first=lambda: nn.Linear(64, 64, bias=False), second=nn.Identity),
        {},
        ["net.first.bias", "no place"],
    ),
    "tensors without a place": (
        Net,
        {f"x{i}": torch.zeros(1) for i in range(7)},
        ["net.x0, net.x1, net.x2, net.x3, net.x4 and 2 more"],
    ),
    "a subclass of Linear": (
        with_part(first=lambda: Doubled(64, 64), second=nn.Identity),
        {},
        ["net.first", "Doubled"],
    ),
    "a table that changes its rows": (limited_net, {}, ["net.embed", "max_norm"]),
    "a buffer that nobody knows": (with_part(hidden=Hidden), {}, ["table of hidden", "recomputed"]),
    "a module that is not in the file": (
        with_part(norm=lambda: nn.LayerNorm(4)),
        {},
        ["net.norm.weight"],
    ),
}


@pytest.mark.parametrize(("make", "changes", "words"), NET_FAULTS.values(), ids=NET_FAULTS.keys())
def test_misfit_is_named_and_leaves_the_module_alone(tmp_path, make, changes, words):
    write_net(tmp_path, **changes)
    with torch.device("meta"):
        net = make()
    before = dict(net.named_modules()), dict(net.named_parameters())
    refusal(lambda: load_packed(net, tmp_path, prefix="net."), *words)
    assert dict(net.named_modules()) == before[0]
    assert all(net.get_parameter(name) is parameter for name, parameter in before[1].items())


def test_a_single_layer_cannot_be_replaced(tmp_path):
    write_net(tmp_path, mask=None, gain=None)
    layer = nn.Linear(64, 64)
    refusal(lambda: load_packed(layer, tmp_path, prefix="net.first."), "Linear", error=Q4MetalError)
