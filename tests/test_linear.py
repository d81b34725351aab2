"""Q4Linear, Q4Embedding and replace_linears as torch modules."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

from torch_q4metal import Q4Embedding, Q4Linear, reference, replace_linears


@pytest.fixture
def layer():
    return Q4Linear.from_linear(nn.Linear(128, 24), group_size=64, bits=4)


def test_forward_equals_the_dense_layer(layer):
    x = torch.randn(2, 3, 128)
    expected = x @ layer.dequantize().T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-3)  # activations of 16 bits
    layer.precision = "exact"
    torch.testing.assert_close(layer(x), expected)
    assert Q4Linear.from_linear(nn.Linear(64, 8, bias=False)).bias is None


def test_to_dtype_moves_only_the_bias(layer):
    before = {name: getattr(layer, name) for name in ("weight", "scales", "biases")}
    for change in (layer.half, layer.double, lambda: layer.to(torch.bfloat16)):
        change()
        assert all(getattr(layer, name) is tensor for name, tensor in before.items())
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(1, 128)).dtype == torch.float32


def test_to_device_moves_everything(layer):
    layer.to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.scales.dtype == torch.float32
    assert layer(torch.empty(3, 128, device="meta")).shape == (3, 24)
    layer.to_empty(device="cpu")
    assert layer.weight.device.type == layer.bias.device.type == "cpu"


def test_state_dict_has_mlx_names_and_dtypes(layer):
    state = layer.state_dict()
    assert {name: t.dtype for name, t in state.items()} == {
        "weight": torch.uint32,
        "scales": torch.float32,
        "biases": torch.float32,
        "bias": torch.float32,
    }
    x = torch.randn(2, 128)
    for assign in (False, True):
        for weight in (state["weight"], state["weight"].view(torch.int32)):
            fresh = Q4Linear(128, 24)
            fresh.load_state_dict(state | {"weight": weight}, assign=assign)
            assert fresh.weight.dtype == torch.int32
            assert torch.equal(fresh(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        Q4Linear(64, 24).load_state_dict(state)


def test_copies_pickles_and_saves(layer):
    x = torch.randn(2, 128)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    restored = Q4Linear(128, 24)
    restored.load_state_dict(torch.load(saved))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), restored):
        assert torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_repr(layer):
    assert repr(layer) == (
        "Q4Linear(in_features=128, out_features=24, bias=True, bits=4, group_size=64, "
        "scales=float32)"
    )
    table = Q4Embedding(10, 64, bits=8, dtype=torch.float16)
    assert (
        repr(table)
        == "Q4Embedding(num_embeddings=10, embedding_dim=64, bits=8, group_size=64, scales=float16)"
    )


def test_only_the_bias_is_a_parameter(layer):
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_indivisible_columns_are_refused():
    with pytest.raises(ValueError, match="100 columns are not a multiple of group_size=64"):
        Q4Linear(100, 4)


def test_embedding_and_its_tied_head():
    dense = nn.Embedding(50, 64)
    table = Q4Embedding.from_embedding(dense, group_size=32, bits=8)
    ids = torch.tensor([[0, 49], [7, 7]])
    expected = reference.dequantize(table.weight, table.scales, table.biases, 32, 8)
    assert torch.equal(table(ids), expected[ids])
    table.dtype = torch.bfloat16
    assert table(ids).dtype == torch.bfloat16
    x = torch.randn(3, 64)
    table.precision = "exact"
    torch.testing.assert_close(table.as_linear(x), x @ expected.T)
    assert copy.deepcopy(table).dtype == torch.bfloat16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        self.odd = nn.Linear(100, 4)
        self.head = nn.Linear(64, 10)
        self.shared = self.head

    def forward(self, x):
        return self.head(self.mlp(x))


def test_replace_linears(caplog):
    model = Model()
    x = torch.randn(5, 64)
    before = model(x)
    with caplog.at_level(logging.INFO, "torch_q4metal"):
        assert replace_linears(model, bits=8, group_size=32) is model
    assert [name for name, m in model.named_modules() if isinstance(m, Q4Linear)] == [
        "mlp.0",
        "mlp.2",
        "head",
    ]
    assert model.shared is model.head
    assert "odd stays dense: in_features=100" in caplog.text
    assert (model(x) - before).abs().max() < 0.05
    model.attention(x, x, x)  # its own projections still work


def test_replace_linears_takes_a_filter_and_a_bare_layer():
    model = replace_linears(Model(), filter=lambda name, linear: name.startswith("mlp"))
    assert isinstance(model.mlp[0], Q4Linear)
    assert type(model.head) is nn.Linear
    assert isinstance(replace_linears(nn.Linear(64, 4)), Q4Linear)
