"""The operators on the MPS device of this machine against its CPU: a line each, and what failed.

For a Mac: ``python tests/macos/mps_report.py``. Exit status 1 if anything differs or fails.
"""

import platform
import sys
import time

import torch

from torch_q4metal import ops, reference

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative rms
SHAPES = [(1, (100, 576)), (3, (9, 896)), (8, (65, 192)), (9, (100, 192)), (70, (37, 384))]
CASES = [
    (rows, shape, dtype, bits, group_size, transpose)
    for rows, shape in SHAPES
    for dtype in BOUNDS
    for bits, group_size in ((4, 64), (8, 64), (3, 32))
    for transpose in (True, False)
]


def relative_rms(result: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (result.cpu().double() - expected.double()).pow(2).mean().sqrt()
    return (difference / expected.double().pow(2).mean().sqrt()).item()


def product(rows, shape, dtype, bits, group_size, transpose) -> float:
    w = reference.quantize(torch.randn(shape).to(dtype), group_size, bits)
    x = torch.randn(rows, shape[1] if transpose else shape[0]).to(dtype)
    arguments = (None, transpose, group_size, bits, "affine", "exact")
    y = ops.matmul(x.to("mps"), *(t.to("mps") for t in w), *arguments)
    return relative_rms(y, reference.matmul(x, *w, *arguments[:4])) / BOUNDS[dtype]


def codec(dtype: torch.dtype) -> float:
    w = torch.randn(19, 192).to(dtype)
    packed, expected = ops.quantize(w.to("mps")), ops.quantize(w)
    same = all(torch.equal(a.cpu(), b) for a, b in zip(packed, expected))
    dense = ops.dequantize(*packed).cpu()
    return 0.0 if same and torch.equal(dense, ops.dequantize(*expected)) else 2.0


def main() -> int:
    print(f"macOS {platform.mac_ver()[0]} {platform.machine()} torch {torch.__version__}")
    if not torch.backends.mps.is_available():
        print("no MPS device here")
        return 1
    torch.manual_seed(0)
    failed = 0
    checks = [(f"matmul {case}", lambda case=case: product(*case)) for case in CASES]
    checks += [(f"codec {dtype}", lambda dtype=dtype: codec(dtype)) for dtype in BOUNDS]
    for name, check in checks:
        begin = time.perf_counter()
        try:
            ratio = check()
            verdict = "ok" if ratio < 1 else "DIFFERS"
            text = f"{ratio:.2g} of the allowed error"
        except Exception as error:  # the report goes on: each line is evidence of its own
            verdict, text = "FAILED", str(error).splitlines()[0]
        failed += verdict != "ok"
        print(f"{verdict:8}{name}: {text}, {time.perf_counter() - begin:.2f} s", flush=True)
    for kernels, seconds in zip(*torch.ops.q4metal.metal_compile_log()):
        print(f"compiled {kernels} in {seconds:.3f} s")
    print(f"{len(checks) - failed} of {len(checks)} passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
