"""The start-up self-check on MPS, on Linux: what it covers, and that it finds a wrong kernel.

A slip is planted in the Metal text that the stand-in compiles. Kernels are kept once they are
compiled, so each case has formats that no other has.
"""

import re
from pathlib import Path

import pytest
import tiny
import torch
from sentence import assert_one_sentence

from torch_q4metal import decode, device_check, self_check
from torch_q4metal.cache import Sequence
from torch_q4metal.generation import generate_step
from torch_q4metal.model_formats import Format, LayerFormats, ModelFormats
from torch_q4metal.models import load_model
from torch_q4metal.pipeline import launch
from torch_q4metal.pipeline.handshake import Settings
from torch_q4metal.self_check import SelfCheckError, check, check_modules, check_plan

METAL = Path(__file__).parent.parent.parent / "csrc" / "metal"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def standin(mac):
    mac.slips = 0
    yield mac
    mac.slip = mac.refusal = None


def formats(form, **changes):
    """A whole model's with one format everywhere; 7 query heads share the keys and values."""
    given = {
        "layers": (LayerFormats.uniform(form),),
        "table": form,
        "head": form,
        "kv_dtype": form.dtype,
        "head_dim": 64,
        "heads": 14,
        "kv_heads": 2,
        "context": 8192,
        "dtype": BF16,
        "precision": "fast",
    }
    return ModelFormats(**given | changes)


def kernels_of_plan(model, rows):
    """Names of the kernels of the plan that decodes the model."""
    return [kernel for _, kernel, *_ in decode.plan_of(model).native.steps(rows)]


def test_every_kernel_of_the_plan_in_one_submission(standin, tmp_path):
    mixed = {"model.layers.1.self_attn.v_proj": {"bits": 6, "group_size": 32}}
    mixed |= {"model.layers.0.mlp.down_proj": False, "lm_head": {"bits": 8, "group_size": 32}}
    longest = {"max_position_embeddings": 2048}
    tiny.write_tiny(tmp_path, tied=False, overrides=mixed, dtype=F16, config=longest)
    model = load_model(tmp_path, device="mps")
    own = ModelFormats.of(model)
    for rows in (1, 8):
        before = standin.plan_statistics()[0]
        report = check_plan(own, rows)
        assert standin.plan_statistics()[0] - before == 1
        assert report.data_bytes <= self_check.LARGEST
        kernels = set(kernels_of_plan(model, rows))
        assert kernels <= set(report.errors)
        others = {name.split(" ")[0] for name in set(report.errors) - kernels}
        prompts = {"q4_matmul", "q4_matvec", "q4_embedding"} if rows == 1 else set()
        assert others == {"plan_attention_split_f16_d16_h2", "plan_sample", *prompts}
        assert check_plan(own, rows) is None  # once a process


@pytest.mark.parametrize(
    "case",
    [
        formats(Format(8, 128, F32), head_dim=128, heads=64, kv_heads=8),
        formats(Format(0, 0, F32), head_dim=128, heads=28, kv_heads=4, layers=()),
        formats(Format(4, 64, BF16), table=None, head=None, context=512),
    ],
    ids=["the most bytes", "only ends", "a stage in the middle"],
)
def test_fits_into_a_megabyte(standin, case):
    assert check(case, 1).data_bytes <= self_check.LARGEST


LAYERS_ONLY = {"table": None, "head": None}
PLANTED = {  # kernel: text, wrong text, format, other changes
    "plan_embed": ("(w, row, k, out)", "(w, row ^ 1, k, out)", (3, 32), {"layers": ()}),
    "plan_qkv": ("b * rope[dim + i])", "-b * rope[dim + i])", (5, 32), LAYERS_ONLY),
    "plan_attention_bf16_d48 ": (
        "sum_of(products[g]) * args.scale", "sum_of(products[g])",
        (2, 32), LAYERS_ONLY | {"head_dim": 48, "context": 512},
    ),
    "plan_attention_split_bf16_d96_h4 and plan_attention_combine_d96 ": (
        "add_chunks<kDim>(chunks, count, args", "add_chunks<kDim>(chunks, 1, args",
        (2, 64), LAYERS_ONLY | {"head_dim": 96, "heads": 8},
    ),
    "plan_residual": ("+ first + f] +=", "+ first + f] =", (6, 32), LAYERS_ONLY),
    "plan_gate_up": ("(1.0f + exp(-g)) * u", "(1.0f + exp(g)) * u", (3, 64), LAYERS_ONLY),
    "plan_head": ("+ first + f] = y;", "+ first + f] = -y;", (5, 64), {"layers": ()}),
    "q4_matmul": ("sums[i][j], a[i], b[j]", "sums[i][j], a[i], b[0]", (3, 128), LAYERS_ONLY),
    "q4_matvec": ("fma(biases[f], x.sum, sum)", "sum", (6, 128), {"layers": ()}),
    "q4_embedding": ("(w, uint(id), k", "(w, uint(id) ^ 1, k", (2, 128), {"layers": ()}),
}  # fmt: skip


@pytest.mark.parametrize("kernel", PLANTED)
def test_a_wrong_kernel_is_named(standin, kernel):
    *slip, (bits, group_size), changes = PLANTED[kernel]
    standin.slip = tuple(slip)
    case = formats(Format(bits, group_size, BF16), **changes)
    with pytest.raises(SelfCheckError) as refused:
        check(case, 1)
    assert standin.slips > 0
    assert str(refused.value).startswith(f"the Metal kernel {kernel}")
    assert_one_sentence(refused.value, ", macOS ", "use device='cpu'")


@pytest.mark.parametrize(
    ("eager", "bits", "slip", "kernel"),
    [
        (False, 5, PLANTED["plan_residual"][:2], "plan_residual_b5_g32_f16_r1 "),
        (True, 6, PLANTED["q4_matvec"][:2], r"q4_matvec \(6 bits, group size 32, .* 1 row\)"),
    ],
)
def test_nothing_is_generated_with_a_wrong_kernel(standin, tmp_path, eager, bits, slip, kernel):
    path = tiny.write_tiny(tmp_path, bits=bits, group_size=32, dtype=F16).path
    model = load_model(path, device="mps")
    model.eager = eager
    standin.slip = slip
    for _ in range(2):  # nor at the next try
        with pytest.raises(SelfCheckError, match=f"the Metal kernel {kernel}"):
            next(generate_step([1, 2, 3], model, max_tokens=4))


@pytest.mark.parametrize(
    ("eager", "group_size", "kernel"),
    [(False, 128, "plan_.*_r3 "), (True, 32, "q4_matvec .* 3 rows")],
)
def test_kernels_for_more_rows_are_checked_before_these(
    standin, tmp_path, eager, group_size, kernel
):
    shape = {"hidden_size": 128, "intermediate_size": 256}
    path = tiny.write_tiny(tmp_path, bits=3, group_size=group_size, dtype=F32, config=shape).path
    model = load_model(path, device="mps")
    model.eager = eager
    decode.forward(model, [[1]], [model.make_cache()])
    standin.slip = PLANTED["q4_matvec"][:2]  # in what plans and operators have in common
    pool = model.make_pool()
    texts = [Sequence(pool) for _ in range(3)]
    with pytest.raises(SelfCheckError, match=f"the Metal kernel {kernel}"):
        decode.forward(model, [[1], [2], [3]], texts)
    assert standin.slips > 0


def test_modules_that_decode_are_checked_at_the_start(standin, tmp_path):
    """As many as they may call: the products of one row and of prompts, and the embedding."""
    tiny.write_tiny(tmp_path, bits=2, group_size=32, dtype=F16)
    before = standin.plan_statistics()[0]
    model = launch.load(tmp_path, Settings(device="mps", eager=True))
    compiled = len(torch.ops.q4metal.metal_compile_log()[0])
    own = ModelFormats.of(model)
    for part, rows in (("layers", 1), ("layers", 300), ("head", 1)):
        assert check_modules(own, part, rows) is None  # once a process
    assert len(list(generate_step(list(range(40)), model, max_tokens=3))) == 3
    assert len(torch.ops.q4metal.metal_compile_log()[0]) == compiled
    assert standin.plan_statistics()[0] == before


def test_a_kernel_that_does_not_compile_is_named(standin):
    standin.refusal = "program_source:7:3: error: unknown type name 'bfloat'"
    with pytest.raises(
        SelfCheckError, match=r"kernel q4_matvec_bf16_f16_b2_g128.* 'bfloat' \(.*macOS"
    ):
        check(formats(Format(2, 128, F16), layers=()), 1)


def kernel_functions():
    """Names of all kernels in csrc/metal but the read probe, which no model uses."""
    texts = (path.read_text() for path in METAL.glob("*.metal"))
    found = {name for text in texts for name in re.findall(r"(?:kernel|\]\]) void\s+(\w+)\(", text)}
    return sorted(found - {"read_probe"}, key=len, reverse=True)


def test_doctor_has_a_row_for_each_operator_and_format(standin):
    rows = list(device_check.check_mps([Format(4, 64, BF16), Format(0, 0, F16)]))
    assert [row.name for row in rows if not row.ok] == []
    names = [row.name for row in rows]
    assert {"mps matvec", "mps matmul, transpose=False", "mps quantize"} <= set(names)
    assert names[-2:] == [
        "mps plan, 4 bits, group size 64, bfloat16, 1 row", "mps plan, dense float16, 2 rows",
    ]  # fmt: skip


def test_doctor_runs_every_kernel(standin):
    functions, before = kernel_functions(), len(standin.dispatches())
    assert all(row.ok for row in device_check.check_mps([Format(4, 64, BF16)]))
    ran = {name for name, *_ in standin.dispatches()[before:]}
    assert {next(f for f in functions if name.startswith(f)) for name in ran} == set(functions)


def test_doctor_goes_on_after_a_wrong_kernel(standin):
    standin.slip = ("fma(biases[f], x.sum, sum)", "sum")  # of packed matrices only
    wrong, right = device_check.check_metal_plans([Format(5, 128, F16), Format(0, 0, F16)])
    assert not wrong.ok
    assert wrong.text.startswith("the Metal kernel q4_matvec (5 bits, group size 128, float16")
    assert right.ok


def test_doctor_goes_on_after_a_kernel_that_does_not_compile(standin):
    standin.refusal = "program_source:7:3: error: unknown type name 'bfloat'"
    rows = list(device_check.check_mps([Format(8, 128, BF16)]))
    assert [row.ok for row in rows] == [False] * len(rows)
    assert all("the Metal kernel " in row.text and "'bfloat'" in row.text for row in rows)
