"""The Metal text of the decode plan's steps, executed: against float64, bit for bit between numbers
of rows and ways of attention, and watched in three run orders."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from torch_q4metal import reference, sampling

from .metal_ops import DTYPES, Kernel
from .metal_plan import (
    Cache,
    Matrix,
    PlanRunner,
    Settings,
    compile_plan,
    plan_kernel,
    shared_heads,
)
from .operands import K_SIZES, N_SIZES, codes_of, random_packed, vector

F32, F16, BF16 = DTYPES
ORDERS = ("forward", "reverse", "shuffled")
EPS = 1e-5
DENSE = 0
Format = tuple[int, int, torch.dtype]  # bits, group size, dtype of scales or of the dense matrix
# Every pair of bits and group size, each of those with every dtype; and what was left dense.
FORMATS: list[Format] = [
    (bits, group_size, DTYPES[(i + j) % 3])
    for i, bits in enumerate(reference.BITS)
    for j, group_size in enumerate(reference.GROUP_SIZES)
] + [(DENSE, 0, dtype) for dtype in DTYPES]
WATCHED = 4  # every fourth is tried in the check build too
# What a step's second and third matrix have where the first has FORMATS[i].
SECOND = [FORMATS[(5 * i + 3) % len(FORMATS)] for i in range(len(FORMATS))]
THIRD = [FORMATS[(8 * i + 4) % len(FORMATS)] for i in range(len(FORMATS))]


def numbers(f: Format) -> tuple[int, int, int]:
    return (f[0], f[1], DTYPES.index(f[2]))


def random_matrix(f: Format, n: int, k: int, bias: bool = False) -> Matrix:
    own = vector(n, F32) if bias else None
    if f[0] == DENSE:
        return Matrix((0.1 * torch.randn(n, k)).to(f[2]), None, None, 0, 0, own)
    case = {"bits": f[0], "group_size": f[1], "scales": f[2], "n": n, "k": k}
    return Matrix(*random_packed(case), f[0], f[1], own)


def dense(m: Matrix) -> Tensor:
    """The matrix in float64."""
    if m.scales is None or m.biases is None:
        return m.weight.double()
    groups = codes_of(m.weight, m.bits).reshape(*m.scales.shape, -1)
    return (groups * m.scales.double()[..., None] + m.biases.double()[..., None]).flatten(1)


def normed(hidden: Tensor, gamma: Tensor) -> Tensor:
    h = hidden.double()
    return h * gamma.double() / (h.square().mean(-1, keepdim=True) + EPS).sqrt()


def product(m: Matrix, x: Tensor) -> Tensor:
    y = x.double() @ dense(m).T
    return y if m.bias is None else y + m.bias.double()


def assert_close(ours: Tensor, exact: Tensor, what: object, bound: float = 2e-6) -> None:
    error = (ours.double() - exact).norm() / exact.norm()
    assert error <= bound, (what, float(error))


@cache
def runners(step: str) -> tuple[PlanRunner, PlanRunner]:
    """The typed and the check build of a step's kernels for all that is tested here."""
    kernels: list[Kernel] = []
    watched: list[Kernel] = []
    for i, f in enumerate(FORMATS):
        formats = [numbers(g) for g in (f, SECOND[i], THIRD[i])]
        kernels.append(plan_kernel(step, formats, kv=DTYPES[i % 3], rows=several(i)))
        if i % WATCHED == 0:
            watched.append(kernels[-1])
            kernels.append(plan_kernel(step, formats, kv=DTYPES[i % 3], rows=1))
    return PlanRunner(compile_plan(kernels)), PlanRunner(compile_plan(watched, "check"))


def several(i: int) -> int:
    """How many rows format i is tried with, besides one."""
    return 2 + i % 7


def in_every_way(i: int, step: str, run: Callable[[PlanRunner, slice], Tensor]) -> Tensor:
    """The result of several rows; where i is watched the same as the check build's in each order,
    and as each row's alone."""
    typed, watched = runners(step)
    rows = slice(several(i))
    y = run(typed, rows)
    if i % WATCHED:
        return y
    for order in ORDERS:
        assert torch.equal(run(watched.with_order(order), rows), y), (FORMATS[i], order)
    for m in range(several(i)):
        assert torch.equal(run(typed, slice(m, m + 1)), y[m : m + 1]), (FORMATS[i], m)
    return y


# ---- matrices


def columns(*formats: Format) -> list[int]:
    """K_SIZES that matrices in these formats can have."""
    return [k for k in K_SIZES if all(f[0] == DENSE or k % f[1] == 0 for f in formats)]


def shapes(i: int, *formats: Format) -> list[tuple[int, int, bool]]:
    """N, K, whether there is a bias: over all i, every pair of N and K."""
    fitting = enumerate(columns(*formats), i)
    return [(N_SIZES[j % len(N_SIZES)], k, j % 2 == 0) for j, k in fitting]


every_format = pytest.mark.parametrize("i", range(len(FORMATS)), ids=lambda i: str(FORMATS[i]))


@every_format
def test_residual_adds_the_product_to_hidden(i: int) -> None:
    for n, k, bias in shapes(i, FORMATS[i]):
        m, x, hidden = random_matrix(FORMATS[i], n, k, bias), torch.randn(8, k), torch.randn(8, n)

        def run(runner: PlanRunner, at: slice) -> Tensor:
            return runner.residual(m, x[at].clone(), hidden[at].clone())  # noqa: B023

        y = in_every_way(i, "residual", run)
        assert_close(y, hidden[: len(y)].double() + product(m, x[: len(y)]), (n, k))


@every_format
def test_gate_up_is_norm_two_products_and_swiglu(i: int) -> None:
    for n, k, bias in shapes(i, FORMATS[i], SECOND[i]):
        gate, up = random_matrix(FORMATS[i], n, k, bias), random_matrix(SECOND[i], n, k, bias)
        gamma, hidden = torch.rand(k) + 0.5, 3 * torch.randn(8, k)

        def run(runner: PlanRunner, at: slice) -> Tensor:
            return runner.gate_up(gate, up, gamma, hidden[at].clone(), EPS)  # noqa: B023

        y = in_every_way(i, "gate_up", run)
        x = normed(hidden[: len(y)], gamma)
        exact = torch.nn.functional.silu(product(gate, x)) * product(up, x)
        assert_close(y, exact, (n, k), 5e-6)


@every_format
def test_head_is_norm_and_product(i: int) -> None:
    for n, k, bias in shapes(i, FORMATS[i]):
        m, gamma = random_matrix(FORMATS[i], n, k, bias), torch.rand(k) + 0.5
        hidden = torch.randn(8, k)

        def run(runner: PlanRunner, at: slice) -> Tensor:
            return runner.head(m, gamma, hidden[at].clone(), EPS)  # noqa: B023

        y = in_every_way(i, "head", run)
        assert_close(y, product(m, normed(hidden[: len(y)], gamma)), (n, k))


@cache
def embedders() -> list[PlanRunner]:
    kernels = [plan_kernel("embed", [numbers(f)]) for f in FORMATS]
    return [PlanRunner(compile_plan(kernels, mode)) for mode in ("typed", "check")]


@every_format
def test_embed_gives_rows_of_the_table_and_nan_for_others(i: int) -> None:
    k = columns(FORMATS[i])[i % 4]
    table = random_matrix(FORMATS[i], 9, k)
    for runner in embedders():
        hidden = runner.embed(table, torch.tensor([3, 8, 9, -1, 0]), k)
        assert_close(hidden[[0, 1, 4]], dense(table)[[3, 8, 0]], "rows", 1e-7)
        assert hidden[2:4].isnan().all()


# ---- attention and what feeds it


def random_cache(
    positions: Tensor, kv_heads: int, head_dim: int, dtype: torch.dtype, slab_blocks: int = 5
) -> Cache:
    """Room for each row's blocks, in random order over slabs of which the last is smaller."""
    used = [int(p) // 32 + 1 for p in positions]
    order = torch.randperm(sum(used) + 2)
    slabs = []
    for first in range(0, len(order), slab_blocks):
        blocks = min(slab_blocks, len(order) - first)
        slabs.append(torch.randn(2, 3, blocks, kv_heads, 32, head_dim).to(dtype))
    tables = torch.full((len(used), max(used)), -1, dtype=torch.int32)
    next_block = 0
    for m, count in enumerate(used):
        tables[m, :count] = order[next_block : next_block + count]
        next_block += count
    return Cache(slabs, tables, layer=1)


def keys_and_values(cache: Cache, row: int, count: int) -> tuple[Tensor, Tensor]:
    """[kv_heads, count, head_dim] of a row, in float64."""
    per_slab = cache.slabs[0].shape[2]
    blocks = cache.block_tables[row, : (count + 31) // 32].tolist()
    parts = [cache.slabs[b // per_slab][:, cache.layer, b % per_slab] for b in blocks]
    keys, values = torch.cat(parts, dim=2)[:, :, :count].double()
    return keys, values


def attention_in_float64(queries: Tensor, positions: Tensor, cache: Cache, scale: float) -> Tensor:
    kv_heads, head_dim = cache.slabs[0].shape[3], cache.slabs[0].shape[5]
    rows = []
    for m, position in enumerate(positions.tolist()):
        keys, values = keys_and_values(cache, m, position + 1)
        q = queries[m].double().reshape(kv_heads, -1, head_dim)
        weights = (q @ keys.transpose(1, 2) * scale).softmax(-1)
        rows.append((weights @ values).flatten())
    return torch.stack(rows)


HEADS = [(F16, 4, 2, 16), (BF16, 7, 1, 64), (F32, 6, 2, 128), (F16, 2, 2, 80), (BF16, 9, 3, 64)]


@cache
def attention_runner(mode: str) -> PlanRunner:
    steps = ("attention", "attention_split", "attention_combine")
    kernels = [
        plan_kernel(step, kv=dtype, head_dim=dim, shared=shared_heads(heads, kv_heads))
        for dtype, heads, kv_heads, dim in (HEADS if mode == "typed" else HEADS[:1])
        for step in steps
    ]
    return PlanRunner(compile_plan(kernels, mode))


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "head_dim"), HEADS)
def test_attention_against_float64_both_ways_and_a_row_alone(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    runner, scale = attention_runner("typed"), head_dim**-0.5
    for positions in ([0, 31, 32, 127, 128, 200, 1000, 1023], [0, 1024, 1500]):
        at = torch.tensor(positions)
        cache = random_cache(at, kv_heads, head_dim, dtype)
        queries = 2 * torch.randn(len(at), heads * head_dim)
        exact = attention_in_float64(queries, at, cache, scale)
        ways = [True] if max(positions) >= 1024 else [True, False]
        results = [runner.attention(queries, at, cache, scale, split) for split in ways]
        assert_close(results[0], exact, positions)
        assert torch.equal(results[0], results[-1])
        for m in range(len(at)):
            single = Cache(cache.slabs, cache.block_tables[m : m + 1].clone(), 1)
            one = (queries[m : m + 1].clone(), at[m : m + 1].clone(), single, scale)
            alone = runner.attention(*one, positions[m] >= 1024)
            assert torch.equal(alone, results[0][m : m + 1])


@pytest.mark.parametrize("order", ORDERS)
def test_attention_is_watched(order: str) -> None:
    runner = attention_runner("check").with_order(order)
    at = torch.tensor([0, 33, 140])
    cache, queries = random_cache(at, 2, 16, F16), torch.randn(3, 64)
    exact = attention_in_float64(queries, at, cache, 0.25)
    for split in (False, True):
        assert_close(runner.attention(queries, at, cache, 0.25, split), exact, split)


def rotated(x: Tensor, rope: Tensor) -> Tensor:
    """x [..., head_dim] by cos and signed sin."""
    a, b = x.chunk(2, -1)
    return x * rope[0].double() + torch.cat([b, a], -1) * rope[1].double()


@every_format
def test_qkv_is_norm_three_products_rope_and_append(i: int) -> None:
    formats, dtype, bias = (FORMATS[i], SECOND[i], THIRD[i]), DTYPES[i % 3], i % 2 == 1
    heads, kv_heads, head_dim, width = 3, 1, (16, 64)[i % 2], columns(*formats)[i % 4]
    matrices = [random_matrix(formats[0], heads * head_dim, width, bias)]
    matrices += [random_matrix(f, kv_heads * head_dim, width, bias) for f in formats[1:]]
    gamma, hidden = torch.rand(width) + 0.5, torch.randn(8, width)
    positions = torch.tensor([0, 31, 32, 77, 64, 5, 127, 96])
    angles = torch.rand(8, head_dim // 2) * 6
    sines = torch.cat([-angles.sin(), angles.sin()], -1)
    rope = torch.stack([torch.cat([angles.cos()] * 2, -1), sines], 1)
    before = random_cache(positions, kv_heads, head_dim, dtype)
    unwritten = 1000.0
    caches: list[Cache] = []

    def run(runner: PlanRunner, at: slice) -> Tensor:
        slabs = [torch.full_like(s, unwritten) for s in before.slabs]
        caches.append(Cache(slabs, before.block_tables[at].clone(), 1))
        inputs = [t[at].clone() for t in (hidden, rope, positions)]
        return runner.qkv(matrices, gamma, *inputs, caches[-1], EPS)

    queries = in_every_way(i, "qkv", run)
    rows = len(queries)
    x = normed(hidden[:rows], gamma)
    q, k, v = (product(m, x).reshape(rows, -1, head_dim) for m in matrices)
    exact = torch.stack([rotated(q[m], rope[m]) for m in range(rows)])
    assert_close(queries, exact.flatten(1), "queries")
    unit = {F32: 2e-6, F16: 5e-4, BF16: 4e-3}[dtype]
    for m in range(rows):
        key, value = (t[:, -1] for t in keys_and_values(caches[0], m, int(positions[m]) + 1))
        assert_close(key, rotated(k[m], rope[m]), "key", unit)
        assert_close(value, v[m], "value", unit)
    written = [torch.cat([s.flatten() for s in c.slabs]) for c in caches]
    assert int((written[0] != unwritten).sum()) == rows * 2 * kv_heads * head_dim
    for other in written[1 : 1 + len(ORDERS)] if i % WATCHED == 0 else []:
        assert torch.equal(other, written[0])


# ---- tokens


def token_runners(step: str) -> list[PlanRunner]:
    kernels = [plan_kernel(step)]
    watched = PlanRunner(compile_plan(kernels, "check"))
    return [PlanRunner(compile_plan(kernels)), *(watched.with_order(o) for o in ORDERS)]


def test_argmax_is_the_first_of_the_largest() -> None:
    for runner in token_runners("argmax"):
        for size in (1, 31, 33, 1023, 1025, 4097):
            logits = torch.randint(-5, 6, (3, size)).float()
            logits[1] = -float("inf")
            logits[2] = 0.5
            assert runner.argmax(logits).tolist() == logits.argmax(-1).tolist(), size


def philox(token: int, position: int, seed: int) -> int:
    """Philox4x32-10 in Python."""
    c = [token, position & 0xFFFFFFFF, position >> 32, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def kept(logits: Tensor, s: Settings) -> Tensor:
    """Which tokens sampling.py would draw from."""
    logprobs = logits.log_softmax(-1)
    if 0 < s.top_p < 1:
        logprobs = sampling.apply_top_p(logprobs, s.top_p)
    if s.min_p > 0:
        logprobs = sampling.apply_min_p(logprobs, s.min_p)
    if s.top_k > 0:
        logprobs = sampling.apply_top_k(logprobs, s.top_k)
    return logprobs > -float("inf")


def drawn(logits: Tensor, s: Settings, position: int) -> int:
    noise = [(philox(i, position, s.seed) >> 9) + 0.5 for i in range(len(logits))]
    gumbel = -(-(torch.tensor(noise, dtype=torch.float64) * 2.0**-23).log()).log()
    scores = logits.double() / s.temperature + gumbel
    return int(scores.masked_fill(~kept(logits, s), -float("inf")).argmax())


def test_philox_has_its_authors_known_answer() -> None:
    assert philox(0, 0, 0) == 0x6627E8D5


SETTINGS = [
    Settings(), Settings(0.7, 0.8, 0.0, 20, 2**40 + 3), Settings(1.3, 0.95, 0.0, 0, 7),
    Settings(0.5, 0.0, 0.05, 0, 8), Settings(2.0, 0.0, 0.0, 3, 9), Settings(1.0, 0.9, 0.1, 5, 10),
    Settings(1.0, 0.0001, 0.0, 0, 11), Settings(0.0, 0.5, 0.5, 5, 12),
]  # fmt: skip


@pytest.mark.parametrize(("size", "spread"), [(1, 1.0), (40, 2.0), (1500, 3.0)])
def test_sample_draws_what_the_filters_leave_with_philox_noise(size: int, spread: float) -> None:
    logits = spread * torch.randn(len(SETTINGS), size)
    positions = torch.randint(2**33, (len(SETTINGS),))
    wanted = [
        int(logits[m].argmax()) if s.temperature == 0 else drawn(logits[m], s, int(positions[m]))
        for m, s in enumerate(SETTINGS)
    ]
    for runner in token_runners("sample"):
        assert runner.sample(logits, SETTINGS, positions).tolist() == wanted


def neighbours(size: int, sign: float) -> Tensor:
    """Floats that follow each other, from 1 or -1 on, in a random order."""
    return (torch.tensor([sign]).view(torch.int32) + torch.randperm(size).int()).view(F32)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sample_tells_neighbouring_floats_apart(sign: float) -> None:
    logits = torch.stack([neighbours(40, sign) for _ in range(8)])
    settings = [Settings(5.0, 0.0, 0.0, 3, seed) for seed in range(8)]
    best = logits.topk(3).indices
    for runner in token_runners("sample"):
        tokens = runner.sample(logits, settings, torch.arange(8))
        assert (tokens[:, None] == best).any(-1).all()


def test_sample_has_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 2.0]])
    runner, count = PlanRunner(compile_plan([plan_kernel("sample")])), 800
    rows = logits.repeat(8, 1)
    tokens = []
    for first in range(0, count, 8):
        tokens.append(runner.sample(rows, [Settings(1.5, seed=5)] * 8, torch.arange(8) + first))
    shares = torch.cat(tokens).bincount(minlength=5) / count
    expected = (logits[0] / 1.5).softmax(-1)
    # Five standard deviations.
    assert ((shares - expected).abs() <= 5 * (expected / count).sqrt()).all(), shares


def test_copy() -> None:
    for runner in token_runners("copy"):
        for count in (1, 255, 257):
            values = torch.randn(count)
            assert torch.equal(runner.copy(values), values)
