"""What the dispatches of a decode plan really read and wrote, against what its steps declare.

Both are byte ranges on the host, by the name of what lies there: a buffer of the plan, a tensor of
the pass, or "weight n". The check build of tests/msl has seen every byte.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Ranges = list[tuple[int, int]]  # sorted, apart
Memory = dict[str, Ranges]

BLOCK = 32  # positions
COMBINE = "plan_attention_combine"
# What a step reads besides, which no step ever writes.
INPUTS = {"norm_qkv_rope_append": ["rope", "block_tables"], "attention": ["block_tables"]}


@dataclass
class Step:
    """A step as the plan declares it; ``weights`` are addresses that its DeviceMemory gave."""

    kind: str
    layer: int
    reads: list[str]
    writes: list[str]
    weights: list[int]

    def __str__(self) -> str:
        return self.kind if self.layer < 0 else f"{self.kind} of layer {self.layer}"


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    result: Ranges = []
    for begin, end in sorted(ranges):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def named(
    begin: int, end: int, places: list[tuple[int, int, str]]
) -> Iterator[tuple[tuple[int, int], str]]:
    """The range in parts, cut where one place ends and another begins; ``places`` are sorted."""
    for place_begin, place_end, name in places:
        if place_begin < end and begin < place_end:
            if begin < place_begin:
                yield (begin, place_begin), "unknown"
            yield (max(begin, place_begin), min(end, place_end)), name
            begin = place_end
    if begin < end:
        yield (begin, end), "unknown"


def bytes_of(ranges: Ranges) -> int:
    return sum(end - begin for begin, end in ranges)


class PassMemory:
    """Where everything lies that one pass of a plan may touch.

    ``weights``: tensors on MPS by the addresses that the plan knows them by. ``tensors``: those of
    the pass by name; "kv" is left out, ``slabs`` are its parts. ``ids`` is None for residual rows.
    """

    def __init__(
        self,
        native: Any,
        handle: int,
        weights: dict[int, Tensor],
        tensors: dict[str, Tensor],
        slabs: list[Tensor],
        tables: Tensor,
        positions: list[int],
        ids: list[int] | None,
    ) -> None:
        self._native, self._tables, self._positions, self._ids = native, tables, positions, ids
        self.steps = [Step(*step) for step in native.plan_steps(handle)]
        self._weights = {address: f"weight {i}" for i, address in enumerate(weights)}
        self._places: Memory = {name: [self._place(t)] for name, t in tensors.items()}
        self._rows_of_weights = {}
        for address, tensor in weights.items():
            name = self._weights[address]
            self._places[name] = [self._place(tensor)]
            self._rows_of_weights[name] = tensor.shape[0]
        self._slabs = [(self._place(slab)[0], slab) for slab in slabs]
        self._places["kv"] = [self._place(slab) for slab in slabs]
        end = 0
        for name, base, row_bytes in native.plan_workspace(handle):
            self._places[name] = [(base, base + len(positions) * row_bytes)]
            end = max(end, base + 8 * row_bytes)
        self._places["chunks"] = [(end, native.plan_workspace_end(handle))]
        if "logits" not in self._places and any("logits" in s.writes for s in self.steps):
            base, row_bytes = native.plan_logits(handle)
            self._places["logits"] = [(base, base + len(positions) * row_bytes)]

    def _place(self, t: Tensor) -> tuple[int, int]:
        offset = t.storage_offset() * t.element_size()
        begin = self._native.host_address(t.untyped_storage().data_ptr(), offset)
        return begin, begin + t.nbytes

    def declared(self, step: Step) -> tuple[Memory, Memory]:
        """What the step is to read, and to write: whole buffers, but of tables what is used."""
        reads = [*step.reads, *INPUTS.get(step.kind, [])]
        read = {name: self._used(name, step, False) for name in reads}
        for address in step.weights:
            name = self._weights[address]
            read[name] = self._rows_of_table(name) if step.kind == "embed" else self._places[name]
        return read, {name: self._used(name, step, True) for name in step.writes}

    def _used(self, name: str, step: Step, is_written: bool) -> Ranges:
        if name == "kv":
            return self._used_cache(step.layer, is_written)
        (place,) = self._places[name]
        if name != "block_tables":
            return [place]
        stride = self._tables.shape[1]
        starts = [place[0] + 4 * stride * row for row in range(len(self._positions))]
        if step.kind == "attention":
            counts = [p // BLOCK + 1 for p in self._positions]
            return merged((s, s + 4 * count) for s, count in zip(starts, counts))
        at = [s + 4 * (p // BLOCK) for s, p in zip(starts, self._positions)]
        return merged((begin, begin + 4) for begin in at)

    def _used_cache(self, layer: int, is_written: bool) -> Ranges:
        """Keys and values of the newest position of each text, or of all of them."""
        found = []
        per_slab = self._slabs[0][1].shape[2]
        for table, last in zip(self._tables.tolist(), self._positions):
            for position in range(last if is_written else 0, last + 1):
                block = table[position // BLOCK]
                base, slab = self._slabs[block // per_slab]
                _, layers, blocks, heads, _, dim = slab.shape
                size = dim * slab.element_size()
                for part in range(2):
                    first = ((part * layers + layer) * blocks + block % per_slab) * heads
                    for head in range(heads):
                        at = base + ((first + head) * BLOCK + position % BLOCK) * size
                        found.append((at, at + size))
        return merged(found)

    def _rows_of_table(self, name: str) -> Ranges:
        ((begin, end),) = self._places[name]
        size = (end - begin) // self._rows_of_weights[name]
        return merged((begin + i * size, begin + (i + 1) * size) for i in self._ids or [])

    def touched(self) -> list[tuple[Memory, Memory]]:
        """What each step of the last pass read and wrote. Memory that has no name is "unknown"."""
        places = sorted((b, e, name) for name, all_ in self._places.items() for b, e in all_)
        found: list[tuple[Memory, Memory]] = []
        for kernel, accesses in self._native.plan_records():
            if not kernel.startswith(COMBINE):  # that is the second half of a step
                found.append(({}, {}))
            for begin, end, is_written in accesses:
                for part, name in named(begin, end, places):
                    found[-1][is_written].setdefault(name, []).append(part)
        return [tuple({n: merged(r) for n, r in m.items()} for m in step) for step in found]


def differences(
    step: Step, declared: tuple[Memory, Memory], touched: tuple[Memory, Memory]
) -> list[str]:
    """A sentence for each name whose bytes are not those that were declared."""
    found = []
    for verb, wanted, seen in zip(("read", "write"), declared, touched, strict=True):
        for name in sorted((wanted.keys() | seen.keys()) - {"chunks"}):
            if name not in wanted:
                found.append(f"{step} {verb}s {name} and does not declare it")
            elif name not in seen:
                found.append(f"{step} declares that it {verb}s {name} and does not")
            elif wanted[name] != seen[name]:
                sizes = bytes_of(seen[name]), bytes_of(wanted[name])
                found.append(f"{step} {verb}s {sizes[0]} bytes of {name}, not these {sizes[1]}")
    chunks = [memory.get("chunks", []) for memory in touched]
    if merged([*chunks[0], *chunks[1]]) != chunks[1] or (chunks[1] and step.kind != "attention"):
        found.append(f"{step} reads chunks that it did not write")
    return found
