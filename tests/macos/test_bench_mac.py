"""bench --mac on the stand-in: every predicted number gets a measured one beside it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from torch_q4metal import bench, bench_mac
from torch_q4metal.mac_kernels import STEPS, StepPass, Weights
from torch_q4metal.model_shapes import MODELS


def test_the_read_probe_reads_everything(mac):
    """Watched: the first test that compiles the kernel decides in which build."""
    mac.mode = "check"
    weights = Weights(50_000, torch.device("mps"))
    sums = torch.zeros(1024 * 256 // 32, dtype=torch.int32).to("mps")
    torch.ops.q4metal.metal_read_probe(weights.codes, sums)
    difference = sums.cpu().long().sum() - weights.codes.cpu().long().sum()
    assert difference % 2**32 == 0
    with pytest.raises(ValueError, match=r"sums is Int .5.* must be int32 .8192. on MPS"):
        torch.ops.q4metal.metal_read_probe(weights.codes, sums[:5])


def test_every_predicted_number_is_measured(mac):
    flags = ["--mac", "--mac-bytes", str(1 << 20), "-n", "1", "-g", "3", "--json"]
    result = CliRunner().invoke(bench.app, flags, catch_exceptions=False)
    rows = {row["name"]: row for row in json.loads(result.stdout.splitlines()[-1])["rows"]}
    names = ["read probe", *STEPS, *(f"{name}, of the probe" for name in STEPS)]
    names += ["4 rows at once", "8 rows at once", "a layer's dispatches, of tiny steps"]
    names += ["weights, from all models", "a layer's dispatches, from all models"]
    for model in MODELS:
        (own,) = (name for name in rows if name.startswith(model.name) and name.endswith(" MB"))
        names += [own, f"{own}, a token"]
        assert rows[f"{own}, a token"]["verdict"] == "confirmed within 10%"
    assert set(names) == set(rows)
    assert all(row["measured"] is not None for row in rows.values())
    verdicts = [row["verdict"] for name, row in rows.items() if name != "read probe"]
    assert all(word.startswith(("confirmed", "refuted")) for word in verdicts)


@pytest.mark.parametrize("name", STEPS)
def test_a_pass_reads_each_weight_once(mac, name):
    shape = bench_mac.cut(MODELS[3], 1 << 20)
    weights = Weights(1 << 20, torch.device("mps"))
    timed = StepPass(shape, STEPS[name], weights)
    half = weights.codes.nbytes * 9 // 8 // 2
    if name != "norm, head":
        assert timed.weight_bytes > half  # and no more than there is
        assert timed.weight_bytes <= 2 * half
    before = mac.plan_statistics()
    timed()
    submissions, dispatches, _ = (a - b for a, b in zip(mac.plan_statistics(), before))
    assert (submissions, dispatches) == (1, timed.dispatches)
    with pytest.raises(ValueError, match="bytes of codes"):
        StepPass(MODELS[3], STEPS[name], weights)


def test_too_few_bytes_are_one_sentence(mac):
    result = CliRunner().invoke(bench.app, ["--mac-bytes", "1000"])
    assert "--mac-bytes is 1000, but passes over less than 1048576 bytes" in str(result.exception)
