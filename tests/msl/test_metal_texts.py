"""The kernel families' texts as the extension hands them to Metal."""

import re
import runpy
from pathlib import Path

import pytest

from .metal_ops import METAL

EMBED = runpy.run_path(str(METAL / "embed.py"))


@pytest.mark.parametrize("family", EMBED["families"]())
def test_metals_names_are_known_before_they_are_used(family: str) -> None:
    lines = EMBED["complete_text"](family).splitlines()
    code = [line for line in lines if line and not re.match(r"//|#(if|else|endif|define)", line)]
    assert code[:2] == ["#include <metal_stdlib>", "using namespace metal;"]


def test_a_text_that_torch_could_not_hand_over_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inner.h").write_text("// fine\n// 8 \u00d7 8\n", encoding="utf-8")
    (tmp_path / "outer.metal").write_text('#include "inner.h"\n')
    with pytest.raises(ValueError, match=r"inner\.h:2: not ASCII"):
        EMBED["_inlined"](tmp_path / "outer.metal", set())
