"""The decode plan on the GPU of a Mac: what differs from the CPU's.

The plan's tensors, rows in and rows out lie on the device, positions and sampling settings on the
host: it must know how long the rows are, and to ask the GPU would be to wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor, nn

from . import _extension, ops
from .cache import Sequence
from .decode_plan import DecodePlan, block_tables, places_of_rows
from .model_formats import ModelFormats
from .models.base import CausalLM
from .row_inputs import RowInputs
from .self_check import check_plan

_native = _extension.load()
_MPS = torch.device("mps")
_ALIGNMENT = 16  # bytes that kernels load at a time


class MetalDecodePlan(DecodePlan):
    """Computes the next tokens of up to 8 rows of ``model`` on MPS, in f32 whatever its dtype.

    Prompts are read by modules.
    """

    def __init__(self, model: CausalLM) -> None:
        self._formats = ModelFormats.of(model)
        self._checked: set[int] = set()  # numbers of rows
        self._memory = _native.DeviceMemory()
        super().__init__(model)

    @staticmethod
    def takes(model: CausalLM) -> bool:
        """Whether the kernels take its shapes, which those of all known models are."""
        dense = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        columns = [m.weight.shape[1] for m in dense]
        return model.config.head_dim % 4 == 0 and not any(n % 16 for n in columns)

    @property
    def reads_prompts(self) -> bool:
        return False

    def check(self, rows: int) -> None:
        """Raises SelfCheckError if a kernel for so many rows (1 to 8) computes wrong numbers."""
        if rows not in self._checked:
            check_plan(self._formats, rows)
            self._checked.add(rows)

    def run(self, x: Tensor, inputs: RowInputs, slabs: list[Tensor], out: Tensor) -> None:
        """As ``DecodePlan.run``; x and ``out`` are on the CPU. Waits once, for the result."""
        rows = torch.empty(out.shape, device=_MPS)
        given = x, inputs.rope, inputs.tables
        on_device, rope, tables = (t.to(_MPS, non_blocking=True) for t in given)
        self.step(on_device, inputs.positions, rope, tables, slabs, rows)
        out.copy_(rows)  # then all was read that is the caller's again

    def read(self, tokens: List[int], sequence: Sequence, length: int) -> None:
        """Puts tokens into the sequence, one at a time; ``length`` as for ``advance``."""
        count = len(tokens)
        sequence.reserve(count)
        positions, rope = places_of_rows(self._rope, [sequence], [count], length)
        tables = block_tables([sequence], [1]).to(_MPS)
        unused = torch.empty(1, dtype=torch.int64, device=_MPS)
        rope, ids = rope.to(_MPS), torch.tensor(tokens).to(_MPS)
        for i, token in enumerate(tokens):
            row = slice(i, i + 1)
            slabs = sequence.pool.slabs
            self.step(ids[row], positions[row], rope[row], tables, slabs, unused)
            sequence.append([token])

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        rope: Tensor,
        tables: Tensor,
        slabs: list[Tensor],
        out: Tensor,
        sampling: Tensor | None = None,
    ) -> None:
        """One pass, which is queued and not waited for; the first of so many rows checks kernels.

        As ``ops.decode_step``: all on MPS but positions and ``sampling``. ``out`` may be token ids
        int64 [R] that a later pass takes as ``x``.
        """
        self.check(len(x))
        ops.decode_step(self.native.handle, x, positions, rope, tables, slabs, out, sampling)

    def _build(self, *parts: Any) -> Any:
        *model, context = parts
        return _native.MetalDecodePlan(*model, self._memory, context)

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        if tensor.storage_offset() * tensor.element_size() % _ALIGNMENT:
            tensor = tensor.clone()
        self._kept.append(tensor)
        offset = tensor.storage_offset() * tensor.element_size()
        return self._memory.address(tensor.untyped_storage().data_ptr(), offset)
