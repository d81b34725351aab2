"""What a measurement was made on: processor, caches, instruction sets, versions, commit, date."""

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_CPUS = Path("/sys/devices/system/cpu")
# Those that decide which kernels run, here and in the peers.
_SETS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """A JSON object for the results file."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "cpu": info.get("model name", platform.machine()),
        "cpu_family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "instruction_sets": [name for name in _SETS if name in flags],
        "cpus": os.cpu_count(),
        "caches": _caches(),
        "load_before": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release().split(chr(45))[0]}",
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short=10", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def one_line(machine: dict[str, Any]) -> str:
    """The same for the head of a table."""
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    return (
        f"{machine['cpu']} (family/model {machine['cpu_family_model']}), {machine['cpus']} CPUs,"
        f" {' '.join(machine['instruction_sets'])}; {caches};"
        f" {machine['memory_bytes'] / 2**30:.0f} GiB; Python {machine['python']},"
        f" {machine['system']}; load before {machine['load_before']:.1f};"
        f" commit {machine['commit']}{changed}; {machine['date']}"
    )


def file_stem(what: str) -> str:
    """``<date>-<cpu>-<what>`` for the name of a results file."""
    cpu = re.sub(r"\(.*?\)|@.*|\bcpu\b|processor", "", describe()["cpu"], flags=re.IGNORECASE)
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-") or "cpu"
    return f"{datetime.date.today().isoformat()}-{cpu}-{what}"


def choose_cores(count: int) -> list[int] | None:
    """CPUs of ``count`` different cores; None where there are no more CPUs than that anyway."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) <= count:
        return None
    cores: dict[tuple[str, str], int] = {}
    for cpu in available:
        topology = _CPUS / f"cpu{cpu}" / "topology"
        place = (_read(topology / "physical_package_id"), _read(topology / "core_id"))
        cores.setdefault(place if place[1] else (str(cpu), ""), cpu)
    return list(cores.values())[:count] if len(cores) >= count else available[:count]


def available_bytes() -> int:
    """Memory that could be used now."""
    match = re.search(r"MemAvailable:\s+(\d+)", _read(Path("/proc/meminfo")))
    return int(match[1]) * 1024 if match else 0


def _cpuinfo() -> dict[str, str]:
    entries = (line.partition(":") for line in _read(Path("/proc/cpuinfo")).splitlines())
    info: dict[str, str] = {}
    for name, _, value in entries:
        info.setdefault(name.strip(), value.strip())
    return info


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted((_CPUS / "cpu0" / "cache").glob("index*")):
        level, kind = _read(index / "level"), _read(index / "type")
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = _read(index / "size")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()
