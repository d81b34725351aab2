"""torch's manners: opcheck, compile, export, autograd, autocast, inference mode, meta."""

import subprocess
import sys

import pytest
import torch

from torch_q4metal import Q4Linear, ops, reference

W = reference.quantize(torch.randn(12, 64), 32, 4)
FORMAT = {"group_size": 32, "bits": 4}
EXACT = {"precision": "exact"}


def samples():
    x = torch.randn(3, 64)
    needs_grad = x.clone().requires_grad_()
    bias = torch.randn(12)
    ids = torch.tensor([[1, 2, 11]])
    yield torch.ops.q4metal.matmul.default, (x, *W), FORMAT
    yield torch.ops.q4metal.matmul.default, (needs_grad, *W, bias.clone().requires_grad_()), FORMAT
    yield (
        torch.ops.q4metal.matmul.default,
        (torch.randn(2, 12).requires_grad_(), *W, None, False),
        FORMAT,
    )
    yield torch.ops.q4metal.matmul.default, (x.half(), *W, bias), FORMAT
    yield torch.ops.q4metal.matmul.default, (torch.empty(0, 64), *W), FORMAT
    yield (
        torch.ops.q4metal.matvec.default,
        (needs_grad.detach()[0].clone().requires_grad_(), *W),
        FORMAT,
    )
    yield torch.ops.q4metal.embedding.default, (ids, *W), FORMAT
    yield torch.ops.q4metal.dequantize.default, W, FORMAT | {"dtype": torch.bfloat16}
    yield torch.ops.q4metal.quantize.default, (torch.randn(4, 64),), FORMAT


@pytest.mark.parametrize("index", range(len(list(samples()))))
def test_opcheck(index):
    op, args, kwargs = list(samples())[index]
    torch.library.opcheck(op, args, kwargs)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Q4Linear.from_linear(torch.nn.Linear(64, 96), group_size=32)
        self.down = Q4Linear.from_linear(torch.nn.Linear(96, 64, bias=False), group_size=32)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def test_compile_fullgraph_forward_and_backward():
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 64, requires_grad=True)
    y = torch.randn(5, 64, requires_grad=True)
    with torch.no_grad():
        y.copy_(x)
    compiled(x).square().sum().backward()
    block(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(
        compiled(torch.ones(9, 64)), block(torch.ones(9, 64))
    )  # another row count


def test_compile_with_inductor():
    block = Block()
    x = torch.randn(5, 64)
    compiled = torch.compile(block, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), block(x))


def test_export_with_a_dynamic_batch():
    block = Block().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(block, (torch.randn(3, 64),), dynamic_shapes=({0: batch},))
    x = torch.randn(17, 64)
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("transpose", [True, False])
def test_gradients_equal_those_of_the_dense_matrix(transpose):
    x = torch.randn(3, 2, 64 if transpose else 12, requires_grad=True)
    bias = torch.randn(12 if transpose else 64, requires_grad=True)
    dense = reference.dequantize(*W, 32, 4)
    gradient = torch.randn(3, 2, bias.numel())
    y = ops.matmul(x, *W, bias, transpose, 32, **EXACT)
    result = torch.autograd.grad(y, (x, bias), gradient)
    expected = torch.autograd.grad(
        x @ (dense.T if transpose else dense) + bias, (x, bias), gradient
    )
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative():
    x = torch.randn(4, 64, requires_grad=True)

    def penalty(y):
        return torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0].square().sum()

    dense = reference.dequantize(*W, 32, 4)
    result = torch.autograd.grad(penalty(ops.matmul(x, *W, None, True, 32, **EXACT)), x)[0]
    expected = torch.autograd.grad(penalty(x @ dense.T), x)[0]
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradient_in_the_dtype_of_x():
    x = torch.randn(4, 64).bfloat16().requires_grad_()
    ops.matmul(x, *W, None, True, 32).sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_autocast_leaves_packed_tensors_alone():
    layer = Q4Linear.from_linear(torch.nn.Linear(64, 64), group_size=32)
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        mixed = layer(torch.nn.functional.linear(x, torch.eye(64)))  # a bfloat16 activation
    assert torch.equal(y, layer(x))
    assert mixed.dtype == torch.float32


def test_inference_mode_and_meta():
    with torch.inference_mode():
        assert torch.equal(
            ops.matmul(torch.ones(1, 64), *W, None, True, 32),
            ops.matmul(torch.ones(1, 64), *W, None, True, 32),
        )
    meta = [t.to("meta") for t in W]
    y = ops.matmul(torch.empty(2, 5, 64, device="meta", dtype=torch.float16), *meta, None, True, 32)
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 12), torch.float32, "meta")
    assert ops.embedding(torch.empty(4, dtype=torch.int64, device="meta"), *meta, 32).shape == (
        4,
        64,
    )


def test_backward_stays_packed():
    """An 8192 x 8192 layer needs far less than its 268 MB of float32 weights."""
    script = """
import resource, torch
from torch_q4metal import ops
weight = torch.zeros(8192, 1024, dtype=torch.int32)
scales = torch.ones(8192, 128)
x = torch.ones(4, 8192, requires_grad=True)
warm = torch.ones(1, 64, requires_grad=True)
ops.matmul(warm, weight[:8, :8], scales[:8, :1], scales[:8, :1]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.matmul(x, weight, scales, scales).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    # All of weight and scales may become resident (42 MB); nothing near a dense copy.
    assert int(out) * unit < 80e6
