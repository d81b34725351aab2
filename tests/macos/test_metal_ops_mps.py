"""torch.ops.q4metal on MPS tensors, on Linux: registration, checks, bindings, grids and kernels.

The host code is csrc/metal itself; what stands in for torch's Metal classes (tests/macos/standin)
runs the text of the kernels through tests/msl.
"""

import threading

import pytest
import standin_build
import test_ops_errors
import torch

from torch_q4metal import ops, reference

BOUND = 2e-6  # relative rms of float32 sums in another order


@pytest.fixture(scope="module")
def standin():
    return standin_build.load()


@pytest.fixture(autouse=True)
def _nothing_of_ours_falls_back(standin):
    yield
    standin.mode = "typed"
    assert not [name for name in standin.fallbacks() if name.startswith("q4metal::")]


def packed(rows, columns, group_size=64, bits=4, dtype=torch.float32):
    return reference.quantize(torch.randn(rows, columns).to(dtype), group_size, bits)


def mps(*tensors):
    return tuple(t.to("mps") for t in tensors)


def relative_rms(result, expected):
    assert result.device.type == "mps"
    difference = (result.cpu().double() - expected.double()).pow(2).mean().sqrt()
    return (difference / expected.double().pow(2).mean().sqrt()).item()


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "shape", "dtypes", "transpose", "group_size", "bits", "bias"),
    [
        (1, (100, 576), (F32, F32), True, 64, 4, None),
        (1, (7, 96), (F16, BF16), True, 32, 4, F16),
        (3, (9, 384), (BF16, BF16), True, 128, 8, BF16),
        (8, (65, 192), (F16, F16), True, 64, 3, F32),
        (9, (100, 192), (F32, F32), True, 64, 4, F32),
        (33, (37, 96), (F16, F16), True, 32, 4, BF16),
        (5, (70, 128), (F32, BF16), False, 64, 4, F16),
    ],
)
def test_matmul(rows, shape, dtypes, transpose, group_size, bits, bias):
    w = packed(*shape, group_size, bits, dtypes[1])
    x = torch.randn(rows, shape[1] if transpose else shape[0]).to(dtypes[0])
    added = None if bias is None else torch.randn(shape[0] if transpose else shape[1]).to(bias)
    arguments = (transpose, group_size, bits, "affine", "exact")
    y = ops.matmul(*mps(x, *w), None if added is None else added.to("mps"), *arguments)
    expected = reference.matmul(x, *w, added, transpose, group_size, bits)
    assert y.dtype == torch.promote_types(*dtypes)
    rounding = {F32: 0.0, F16: 2**-11, BF16: 2**-8}[y.dtype]
    assert relative_rms(y, expected) < BOUND + rounding


@pytest.mark.parametrize("mode", ["typed", "check"])
def test_slices_and_strides(standin, mode):
    """Rows of a larger matrix, x at an odd offset and transposed, a bias out of the middle."""
    standin.mode = mode
    bits = 5
    weight, scales, biases = packed(20, 128, 64, bits)
    part = tuple(t[3:12] for t in mps(weight, scales, biases))
    expected_part = tuple(t[3:12] for t in (weight, scales, biases))
    x, bias = torch.randn(128 * 3 + 1), torch.randn(30)
    on_mps, bias_mps = mps(x, bias)
    for view in (
        lambda t: t[1:129],
        lambda t: t[1:257].view(2, 128),
        lambda t: t[: 128 * 3].view(128, 3).t(),
        lambda t: t[: 128 * 3].view(3, 1, 128).expand(3, 2, 128),
        lambda t: t[: 128 * 3].view(3, 128)[::2],
    ):
        y = ops.matmul(view(on_mps), *part, bias_mps[5:14], bits=bits)
        expected = reference.matmul(view(x), *expected_part, bias[5:14], True, 64, bits)
        assert y.shape == expected.shape
        assert relative_rms(y, expected) < BOUND


def test_scales_and_biases_of_two_dtypes():
    weight, scales, biases = packed(8, 64, dtype=F16)
    x, biases = torch.randn(2, 64).half(), biases.to(BF16)
    y = ops.matmul(*mps(x, weight, scales, biases))
    assert y.dtype == F32
    assert relative_rms(y, reference.matmul(x, weight, scales, biases)) < BOUND


def test_uint32_weights():
    weight, scales, biases = packed(8, 64, dtype=F16)
    x = torch.randn(64).half()
    y = ops.matvec(*mps(x, weight.view(torch.uint32), scales, biases))
    assert torch.equal(y, ops.matvec(*mps(x, weight, scales, biases)))


def test_codec_gives_the_bits_of_the_cpu():
    w = torch.randn(19, 192).half()
    given = ops.quantize(w)
    for result, expected in zip(ops.quantize(w.to("mps")), given):
        assert result.device.type == "mps"
        assert torch.equal(result.cpu(), expected)
    on_mps = mps(*given)
    assert torch.equal(ops.dequantize(*on_mps).cpu(), ops.dequantize(*given))
    ids = torch.tensor([[0, 18, 3], [3, 7, 1]])
    for kind in (ids, ids.int(), ids[:, 1:], ids.t()):
        result = ops.embedding(kind.to("mps"), *on_mps, dtype=F32)
        assert torch.equal(result.cpu(), ops.embedding(kind, *given, dtype=F32))
    sliced = ops.embedding(ids.to("mps")[1, 1:], *on_mps, dtype=F32)
    assert torch.equal(sliced.cpu(), ops.embedding(ids[1, 1:], *given, dtype=F32))


def test_ids_outside_of_the_table_give_nan(standin):
    given = ops.quantize(torch.randn(19, 192).half())
    rows = ops.embedding(torch.tensor([19, -1, 2]).to("mps"), *mps(*given), dtype=F32).cpu()
    assert rows[:2].isnan().all()
    assert torch.equal(rows[2], ops.dequantize(*given, dtype=F32)[2])


def test_nothing_to_do_dispatches_nothing(standin):
    w = mps(*packed(8, 64))
    before = len(standin.dispatches())
    assert ops.matmul(torch.empty(0, 64).to("mps"), *w).shape == (0, 8)
    assert ops.matmul(torch.empty(2, 0, 64).to("mps"), *w).shape == (2, 0, 8)
    assert ops.embedding(torch.empty(0, dtype=torch.int64).to("mps"), *w).shape == (0, 64)
    assert ops.dequantize(*(t[:0] for t in w)).shape == (0, 64)
    assert ops.quantize(torch.empty(0, 64).to("mps"))[0].shape == (0, 8)
    empty = tuple(t[:, :0] for t in w)
    bias = torch.arange(8.0).to("mps")
    product = ops.matmul(torch.empty(2, 0).to("mps"), *empty, bias)
    assert torch.equal(product.cpu(), torch.arange(8.0).expand(2, 8))
    assert len(standin.dispatches()) == before


def test_a_failing_test_can_show_its_tensors():
    """As pytest does: to print an MPS tensor takes a dozen operators and their fallbacks."""
    assert repr(torch.arange(3.0).to("mps")) == "tensor([0., 1., 2.], device='mps:0')"


def test_one_dispatch_an_operator_with_the_grid_of_launch_h(standin):
    w = packed(100, 576)
    x = torch.randn(9, 576)
    arguments = mps(x, *w)
    before = len(standin.dispatches()), standin.allocations()
    ops.matmul(*arguments, precision="exact")
    ops.matvec(arguments[0][0], *arguments[1:])
    made = standin.dispatches()[before[0] :]
    # ceil(9 / 16) x ceil(100 / 64) threadgroups of 128; ceil(100 / 8) of 64.
    assert [sizes for _, *sizes in made] == [
        [(128, 2, 1), (128, 1, 1)],
        [(13 * 64, 1, 1), (64, 1, 1)],
    ]
    assert standin.allocations() - before[1] == 2  # the results


def moved(function):
    """The function with its CPU tensors on MPS."""

    def on_mps(argument):
        is_cpu = isinstance(argument, torch.Tensor) and argument.device.type == "cpu"
        return argument.to("mps") if is_cpu else argument

    def call(*arguments, **named):
        return function(*map(on_mps, arguments), **{k: on_mps(v) for k, v in named.items()})

    return call


@pytest.mark.parametrize(
    "name", [n for n in test_ops_errors.CASES if n not in ("ids high", "ids low")]
)
def test_errors_are_those_of_the_cpu(name, monkeypatch):
    call, error, sentence = test_ops_errors.CASES[name]
    for operator in ("matmul", "matvec", "embedding", "dequantize", "quantize"):
        monkeypatch.setattr(ops, operator, moved(getattr(ops, operator)))
    with pytest.raises(error, match=sentence):
        call()


def test_tensors_on_two_devices():
    weight, scales, biases = packed(8, 64)
    with pytest.raises(ValueError, match="x is on cpu and weight on mps:0"):
        ops.matmul(torch.randn(2, 64), *mps(weight, scales, biases))
    with pytest.raises(ValueError, match="scales on cpu"):
        ops.matmul(torch.randn(2, 64).to("mps"), weight.to("mps"), scales, biases.to("mps"))


def test_every_operator_has_its_own_kernel_for_mps():
    """So that PYTORCH_ENABLE_MPS_FALLBACK finds nothing of ours to move to the CPU."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    ours = {n for n in names if n.startswith("q4metal::")}
    ours -= {n for n in ours if n.startswith("q4metal::metal_")}  # of no tensor
    assert len(ours) >= 6
    for name in ours:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "MPS"), name


def test_kernels_are_compiled_once_and_timed(standin):
    arguments = mps(torch.randn(96), *packed(8, 96, 32, 2))
    before = torch.ops.q4metal.metal_compile_log()
    for _ in range(2):
        ops.matvec(*arguments, group_size=32, bits=2)
    names, seconds = torch.ops.q4metal.metal_compile_log()
    assert names == [*before[0], "q4_matvec_f32_f32_b2_g32_r1"]
    assert seconds[-1] > 0


def test_a_kernel_that_does_not_compile_is_named(standin):
    arguments = mps(torch.randn(256), *packed(8, 256, 128, 2))
    standin.refusal = "program_source:7:3: error: unknown type name 'bfloat'"
    with pytest.raises(RuntimeError, match=r"q4_matvec_f32_f32_b2_g128_r1 .* unknown type name"):
        ops.matvec(*arguments, group_size=128, bits=2)
    standin.refusal = None
    ops.matvec(*arguments, group_size=128, bits=2)  # the next try may succeed


def test_threads_share_the_compiled_kernels(standin):
    w = packed(40, 576)
    arguments = mps(*w)
    x = torch.randn(4, 576)
    results = [None] * 4

    def work(i):
        results[i] = ops.matvec(x[i].to("mps"), *arguments).cpu()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        assert torch.equal(result, ops.matvec(x[i].to("mps"), *arguments).cpu())
