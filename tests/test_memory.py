"""The memory check: what is read from which system, and the sentence it ends in."""

import re

import pytest
import tiny
import torch
from sentence import assert_one_sentence

from torch_q4metal import memory
from torch_q4metal.checkpoint import Checkpoint
from torch_q4metal.errors import MemoryLimitError
from torch_q4metal.models import load_model
from torch_q4metal.models.loading import read_family

MEMINFO = "MemTotal:       24683672 kB\nMemFree:        22510284 kB\nMemAvailable:   20000000 kB\n"
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            200000.
Pages inactive:                          190000.
Pages speculative:                         2000.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                           5000.
"Translation faults":                 123456789.
File-backed pages:                       150000.
Anonymous pages:                         240000.
Pages stored in compressor:              300000.
Pages occupied by compressor:             60000.
"""


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return memory.linux_available(root / "proc", root / "cgroup")


def test_linux_without_limits(tmp_path):
    assert write(tmp_path, {"proc/meminfo": MEMINFO}) == 20_000_000 * 1024
    files = {
        "proc/self/cgroup": "0::/\n",
        "cgroup/memory.max": "max\n",
        "cgroup/memory.current": "5\n",
    }
    assert write(tmp_path, files) == 20_000_000 * 1024


def test_linux_control_groups_of_version_2(tmp_path):
    """The tightest group on the way to the root counts, page cache is taken as free."""
    available = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/user.slice/job\n",
            "cgroup/user.slice/memory.max": "4000000000\n",
            "cgroup/user.slice/memory.current": "3000000000\n",
            "cgroup/user.slice/memory.stat": "anon 7\ninactive_file 500000000\nactive_file 1\n",
            "cgroup/user.slice/job/memory.max": "9000000000\n",
            "cgroup/user.slice/job/memory.current": "1000\n",
        },
    )
    assert available == 4_000_000_000 - 3_000_000_000 + 500_000_001


def test_linux_container_that_sees_its_own_root_only(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/../docker/abc\n",
        "cgroup/memory.max": "1000000\n",
        "cgroup/memory.current": "2000000\n",
    }
    assert write(tmp_path, files) == 0


def test_linux_control_groups_of_version_1(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n",
        "cgroup/memory/memory.limit_in_bytes": "6000\n",
        "cgroup/memory/memory.usage_in_bytes": "5000\n",
        "cgroup/memory/memory.stat": "inactive_file 9\ntotal_inactive_file 200\n",
    }
    assert write(tmp_path, files) == 1200
    unlimited = {"cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert write(tmp_path, unlimited) == 20_000_000 * 1024


def test_nothing_to_read_is_unknown(tmp_path):
    assert write(tmp_path, {}) is None
    assert memory.macos_available("", "") is None
    assert memory.macos_available("17179869184", "Pages free: 12.") is None


def test_macos():
    held = (100000 + 240000 + 60000 - 5000) * 16384
    assert memory.macos_available("17179869184\n", VM_STAT) == 17179869184 - held


def test_this_machine():
    available = memory.available_memory()
    assert available is None or available > 50e6


@pytest.fixture
def checkpoint(tmp_path):
    fields = {"max_position_embeddings": 100_000}
    return Checkpoint.open(tiny.write_tiny(tmp_path / "model", config=fields).path)


def check(checkpoint, context, available, **options):
    _, config = read_family(checkpoint)
    memory.check_memory(
        config, checkpoint.weight_bytes, torch.float16, context, available=available, **options
    )


def test_the_context_that_is_named_fits_and_no_much_longer_one(checkpoint):
    _, config = read_family(checkpoint)
    assert memory.kv_bytes_per_token(config, torch.float16) == 2 * 2 * 2 * 16 * 2
    available = 80_000_000
    with pytest.raises(MemoryLimitError) as error:
        check(checkpoint, 100_000, available)
    assert_one_sentence(error.value, "100000 tokens", "0.08 GB", "max_kv_size", "force")
    fits = int(re.search(r"a context of (\d+) tokens would fit", str(error.value))[1])
    assert 256 <= fits < 100_000
    assert fits % 32 == 0
    check(checkpoint, fits, available)
    with pytest.raises(MemoryLimitError):
        check(checkpoint, fits + 32, available)


def test_no_context_fits(checkpoint):
    with pytest.raises(MemoryLimitError) as error:
        check(checkpoint, 512, 1_000_000)
    assert_one_sentence(error.value, "no context would fit", "smaller model")


def test_force_only_warns(checkpoint, caplog):
    check(checkpoint, 512, 1_000_000, force=True)
    assert "no context would fit" in caplog.text


def test_load_model_checks_before_it_loads(tmp_path, monkeypatch):
    path = tiny.write_tiny(tmp_path / "model").path
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    monkeypatch.setattr("torch_q4metal.models.loading.load_packed", None)
    with pytest.raises(MemoryLimitError):
        load_model(path)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    assert load_model(path, force=True).max_kv_size == 512
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    load_model(path)


def test_cache_dtype_counts_as_it_will_be(checkpoint, monkeypatch):
    """f32 scales and exact precision keep f32: a context that fits in 16 bits may then not fit."""
    pool = load_model(checkpoint.path).make_pool(32)
    _, config = read_family(checkpoint)
    assert pool.bytes_per_token == memory.kv_bytes_per_token(config, torch.float32)
