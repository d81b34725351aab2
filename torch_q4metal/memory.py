"""Will it fit? Weights, KV cache and working memory against what the machine has left."""

from __future__ import annotations

import logging
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MemoryLimitError
from .machine import peak_footprint, peak_rss

if TYPE_CHECKING:
    import torch

    from .models.config import DecoderConfig

logger = logging.getLogger(__name__)

SMALLEST_CONTEXT = 256
"""Below this no context is offered: nobody can use it."""
_CHUNK = 512  # rows of a prefill pass
_FIXED_BYTES = 64 << 20  # tokenizer, Python objects, threads' stacks


def check_memory(
    config: DecoderConfig,
    weight_bytes: int,
    kv_dtype: torch.dtype,
    context: int,
    *,
    layers: int | None = None,
    force: bool = False,
    available: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Raises MemoryLimitError, naming the context that would fit, unless model and cache do fit.

    ``context``: positions of the KV cache. ``layers``: how many are here, None for all.
    ``available``: bytes, None for what ``device`` (None: the CPU) has left.
    ``force`` only warns. On a system whose memory cannot be read nothing is checked.
    """
    on_mps = device is not None and device.type == "mps"
    if available is None:
        available = available_on_mps() if on_mps else available_memory()
    if available is None:
        logger.info("available memory is unknown here, so it was not checked")
        return
    kv_bytes = kv_bytes_per_token(config, kv_dtype, layers)
    # The modules gather one layer's keys and values in f32.
    kv_bytes += 8 * config.num_key_value_heads * config.head_dim
    if on_mps:  # scores of one KV head, before and after softmax
        kv_bytes += 8 * _CHUNK * config.num_attention_heads // config.num_key_value_heads
    work = working_bytes(config)
    needed = weight_bytes + context * kv_bytes + work
    if needed <= available:
        return
    fitting = (available - weight_bytes - work) // kv_bytes
    if fitting >= SMALLEST_CONTEXT:
        cure = f"a context of {fitting // 32 * 32} tokens would fit (max_kv_size)"
    else:
        cure = "no context would fit, so take a smaller model"
    message = (
        f"the model needs {_gb(weight_bytes)} for weights, {_gb(context * kv_bytes)} for a context "
        f"of {context} tokens and {_gb(work)} to work in, but {_gb(available)} of memory are free: "
        f"{cure}, or close other programs, or load it anyway with force."
    )
    if not force:
        raise MemoryLimitError(message)
    logger.warning("%s", message)


def kv_bytes_per_token(
    config: DecoderConfig, kv_dtype: torch.dtype, layers: int | None = None
) -> int:
    """Bytes of keys and values of one position, over so many layers; None is all."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * kv_dtype.itemsize
    return (config.num_hidden_layers if layers is None else layers) * per_layer


def working_bytes(config: DecoderConfig) -> int:
    """Bytes that a prefill pass of 512 rows takes beside weights and cache, generously counted."""
    row = 4 * config.hidden_size + 3 * config.intermediate_size
    row += 4 * config.num_attention_heads * config.head_dim
    return _FIXED_BYTES + 4 * (_CHUNK * row + 4 * config.vocab_size)


def available_memory() -> int | None:
    """Bytes that could be used now without swapping; None where that cannot be found out."""
    if platform.system() == "Linux":
        return linux_available(Path("/proc"), Path("/sys/fs/cgroup"))
    if platform.system() == "Darwin":
        return macos_available(_output_of("sysctl", "-n", "hw.memsize"), _output_of("vm_stat"))
    return None


def available_on_mps() -> int:
    """Bytes that the GPU may still take, which shares the machine's memory."""
    import torch

    left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = available_memory()
    return max(0, left if free is None else min(left, free))


def gpu_bytes(device: torch.device) -> int:
    """Bytes of the GPU's buffers of this process, 0 on the CPU.

    Torch keeps what it has freed for the next tensor, so these are about the most that there were.
    """
    import torch

    return torch.mps.driver_allocated_memory() if device.type == "mps" else 0


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far, the GPU's buffers included.

    With MPS what macOS counts, where it tells. The resident size and these buffers, added, would
    count the weights twice: the host reads them to there.
    """
    if device.type == "mps" and (peak := peak_footprint()):
        return peak
    return peak_rss() + gpu_bytes(device)


def linux_available(proc: Path, cgroup: Path) -> int | None:
    """The smallest of ``MemAvailable`` and what the control groups of this process leave.

    Containers have far less than the machine: a group's limit counts, and that of every group
    above it. Page cache counts as free, since it makes way.
    """
    candidates = []
    if match := re.search(r"^MemAvailable:\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE):
        candidates.append(int(match[1]) * 1024)
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            root, limit, usage = cgroup, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit = cgroup / "memory", "memory.limit_in_bytes"
            usage = "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the path is the host's, and only the root can be seen.
        groups = [root / path.strip("/"), *(root / path.strip("/")).parents]
        for group in groups[: len(Path(path.strip("/")).parts) + 1]:
            left = _cgroup_left(group, limit, usage)
            if left is not None:
                candidates.append(left)
    return min(candidates, default=None)


def macos_available(memsize: str, vm_stat: str) -> int | None:
    """From the texts of ``sysctl -n hw.memsize`` and ``vm_stat``: memory less what is held.

    Held are wired, active-anonymous and compressed pages; file pages make way.
    """
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    counts = {
        name.strip('" ').lower(): int(count)
        for name, count in re.findall(r"^(.+?):\s+(\d+)\.", vm_stat, re.MULTILINE)
    }
    held = ("pages wired down", "anonymous pages", "pages occupied by compressor")
    if page is None or not memsize.strip().isdigit() or not all(name in counts for name in held):
        return None
    used = int(page[1]) * sum(counts[name] for name in held)
    return max(0, int(memsize) - used + int(page[1]) * counts.get("pages purgeable", 0))


def _cgroup_left(group: Path, limit_name: str, usage_name: str) -> int | None:
    limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
    # "max", or a number near 2^63 in version 1, is no limit.
    if not limit.isdigit() or not usage.isdigit() or int(limit) >= 1 << 60:
        return None
    stat = dict(line.split() for line in _read(group / "memory.stat").splitlines() if " " in line)
    cached = sum(
        int(stat.get(f"total_{name}", stat.get(name, "0")))
        for name in ("inactive_file", "active_file")
    )
    return max(0, int(limit) - max(0, int(usage) - cached))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
