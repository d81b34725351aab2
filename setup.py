"""Builds the extension torch_q4metal._C from csrc/ against the torch that is installed.

``DEBUG=1`` builds without optimisation. Every source file compiles with the same flags for any CPU:
kernels for an instruction set say so themselves (csrc/cpu/avx2.h, neon.h) and are chosen at run
time.
"""

import json
import os
import platform
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
SOURCES = [
    "csrc/ops.cpp",
    "csrc/module.cpp",
    "csrc/cpu/ops_cpu.cpp",
    "csrc/cpu/decode_step.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/executor.cpp",
    "csrc/cpu/executor_pass.cpp",
    "csrc/cpu/executor_workspace.cpp",
    "csrc/cpu/prefill.cpp",
    "csrc/cpu/executor_registry.cpp",
    "csrc/cpu/threads.cpp",
    "csrc/cpu/token_draw.cpp",
    "csrc/cpu/cpu_features.cpp",
    "csrc/cpu/codec.cpp",
    "csrc/cpu/read_probe.cpp",
    "csrc/cpu/ref.cpp",
    "csrc/cpu/amx_emulated.cpp",
    "csrc/plan/bindings.cpp",
    "csrc/plan/plan.cpp",
]
MACHINE = platform.machine().lower()
if MACHINE in ("x86_64", "amd64"):
    SOURCES += [
        "csrc/cpu/avx2.cpp",
        "csrc/cpu/avx2_split.cpp",
        "csrc/cpu/avx2_split_prepare.cpp",
        "csrc/cpu/avx2_fast_gemm.cpp",
        "csrc/cpu/avx2_int8_gemm.cpp",
        "csrc/cpu/avx512.cpp",
        "csrc/cpu/avx512_split.cpp",
        "csrc/cpu/avx512_one_row.cpp",
        "csrc/cpu/avx512_several_rows.cpp",
        "csrc/cpu/avx512_fast_gemm.cpp",
        "csrc/cpu/avx512_int8_gemm.cpp",
        "csrc/cpu/amx.cpp",
    ]
elif MACHINE in ("arm64", "aarch64"):
    SOURCES += [
        "csrc/cpu/neon.cpp",
        "csrc/cpu/neon_split.cpp",
        "csrc/cpu/neon_split_gemm.cpp",
        "csrc/cpu/neon_i8mm_gemm.cpp",
    ]

DEBUG = os.environ.get("DEBUG") == "1"
# -ffp-contract=off: where MLX rounds a product and then a sum, the compiler must not fuse them.
FLAGS = [
    "-std=c++20",
    "-O0" if DEBUG else "-O3",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
]

# The Metal backend: its kernels are text in the extension, compiled by torch when they are needed.
LINK_FLAGS: list[str] = []
if sys.platform == "darwin":
    KERNEL_TEXT = "build/metal/kernel_text.cpp"
    runpy.run_path(str(ROOT / "csrc/metal/embed.py"))["write_source"](ROOT / KERNEL_TEXT)
    SOURCES += [
        KERNEL_TEXT,
        "csrc/metal/bindings.cpp",
        "csrc/metal/decode_plan.cpp",
        "csrc/metal/decode_step_mps.cpp",
        "csrc/metal/encoder.cpp",
        "csrc/metal/library.mm",
        "csrc/metal/ops_mps.mm",
        "csrc/metal/pipelines.cpp",
        "csrc/metal/read_probe_mps.cpp",
        "csrc/metal/sink.mm",
    ]
    # A wrong selector is only a warning otherwise. No ARC: see csrc/metal/library.h.
    FLAGS += ["-Werror=objc-method-access"]
    LINK_FLAGS += ["-framework", "Metal", "-framework", "Foundation"]


def for_one_machine(command: list[str]) -> list[str]:
    """Without ``-arch`` of others: Python from python.org compiles for Intel Macs too, which have
    no NEON, and for which there is no torch.
    """
    others = [
        i
        for i, (word, value) in enumerate(pairwise(command))
        if word == "-arch" and value != MACHINE
    ]
    return [word for i, word in enumerate(command) if i not in others and i - 1 not in others]


class BuildWithStamp(BuildExtension):
    """Leaves _build.json beside the extension: a wrong torch is named before the loader fails.

    Object files stay in build/objects, also where pip would take a folder that it removes: the next
    build compiles what has changed, and the test of the kernel tables links them.
    """

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_temp = str(ROOT / "build" / "objects")  # unless --build-temp is given

    def build_extensions(self) -> None:
        for name, command in list(vars(self.compiler).items()):
            if sys.platform == "darwin" and isinstance(command, list):
                setattr(self.compiler, name, for_one_machine(command))
        super().build_extensions()

    def run(self) -> None:
        super().run()
        package = ROOT / "torch_q4metal" if self.inplace else Path(self.build_lib) / "torch_q4metal"
        (package / "_build.json").write_text(json.dumps({"torch": torch.__version__}) + "\n")


setup(
    ext_modules=[
        CppExtension(
            "torch_q4metal._C",
            SOURCES,
            extra_compile_args={"cxx": FLAGS + (["-g"] if DEBUG else ["-g0"])},
            extra_link_args=LINK_FLAGS,
            depends=[
                str(path.relative_to(ROOT))
                for path in sorted(ROOT.glob("csrc/**/*"))
                if path.suffix in (".h", ".mm", ".metal", ".py")
            ],
        )
    ],
    cmdclass={"build_ext": BuildWithStamp},
)
