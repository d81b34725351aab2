"""2, 3 and 4 processes that the real torchrun starts, on loopback, against one process."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from torchrun import run_torchrun

from torch_q4metal.generation import decode_together, generate_step
from torch_q4metal.models import load_model

LAYERS = 8
LONG = {"config": {"max_position_embeddings": 2048}, "layers": LAYERS}
CASES = {
    "two, even, tied": {
        "model": {"family": "llama"}, "world_size": 2, "settings": {"split": "4,4"},
        "threads": [1, 1],
    },
    "two, uneven, untied, modules": {
        "model": {"family": "qwen2", "tied": False}, "world_size": 2,
        "settings": {"split": "1,7", "eager": True}, "threads": [2, 1],
    },
    "three, measured": {
        "model": {"family": "qwen2"}, "world_size": 3, "settings": {"split": "auto"},
        "threads": [1, 2, 1],
    },
    "three, by memory": {
        "model": {"family": "llama", "tied": False, "shards": 3}, "world_size": 3,
        "settings": {"split": "memory", "precision": "exact"}, "threads": [1, 1, 1],
    },
    "four, quarters": {
        "model": {"family": "llama", "tied": False, "hidden_size": 512,
                  "intermediate_size": 1536, "group_size": 64, "shards": 2},
        "world_size": 4, "settings": {"split": "2,2,2,2"}, "threads": [1, 1, 1, 1],
    },
}  # fmt: skip


def random_prompt(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(256, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """case -> (its directory, what rank 0 saw, (mapped, resident) bytes of each rank)."""
    folder = tmp_path_factory.mktemp("torchrun")
    cases = []
    for number, case in enumerate(CASES.values()):
        path = tiny.write_tiny(folder / str(number), **LONG, **case["model"]).path
        prompts = [random_prompt(n) for n in (6, 700)]
        batch = [random_prompt(n) for n in (20, 3, 550, 9)]
        cases.append(case | {"path": str(path), "prompts": prompts, "batch": batch})
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("ranks.py")
    done = run_torchrun(script, folder / "cases.json", folder / "answers.pt", processes=4)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "answers.pt")
    return {name: (case, *answer) for name, case, answer in zip(CASES, cases, found, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logits_equal_one_process(answers, name):
    """The plan's with the same bits, those of modules nearly so, whatever the thread counts."""
    case, seen, _ = answers[name]
    settings = case["settings"]
    model = load_model(case["path"], precision=settings.get("precision"))
    model.eager = settings.get("eager", False)
    for prompt, tokens, logprobs in zip(
        case["prompts"], seen["tokens"], seen["logprobs"], strict=True
    ):
        steps = list(generate_step(list(prompt), model, max_tokens=4))
        assert tokens == [token for token, _ in steps]
        expected = torch.stack([logprobs for _, logprobs in steps])
        if model.eager:
            torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
        else:
            assert torch.equal(logprobs, expected)
    batch = [[] for _ in case["batch"]]
    decode_together(
        model, case["batch"], 6, lambda index, token, last: batch[index].append(token) or False
    )
    assert seen["batch"] == batch


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_on_one_rank(answers, name):
    case, seen, _ = answers[name]
    ranges = [range(*stage["layers"]) for stage in seen["stages"]]
    assert [layer for part in ranges for layer in part] == list(range(LAYERS))
    if case["settings"]["split"][0].isdigit():
        assert ",".join(str(len(part)) for part in ranges) == case["settings"]["split"]


@pytest.mark.parametrize("name", CASES)
def test_each_rank_maps_only_its_own_bytes(answers, name):
    """What a stage has mapped is its tensors, give or take the pages around them."""
    case, seen, held = answers[name]
    whole = load_model(case["path"]).checkpoint
    for stage, (mapped, resident) in zip(seen["stages"], held, strict=False):
        pages = 8192 * 8  # around each of a few ranges
        assert abs(mapped - stage["weight_bytes"]) <= pages
        assert abs(resident - stage["weight_bytes"]) <= pages
    ends = [stage["weight_bytes"] for stage in (seen["stages"][0], seen["stages"][-1])]
    total = sum(stage["weight_bytes"] for stage in seen["stages"])
    table = sum(t.nbytes for n, t in whole.tensors.items() if n.startswith("model.embed_tokens"))
    assert total == whole.weight_bytes + (table if not whole.has("lm_head.weight") else 0)
    assert min(ends) > table


def test_a_quarter_of_the_layers_takes_a_quarter_of_the_memory(answers):
    case, seen, held = answers["four, quarters"]
    whole = load_model(case["path"]).checkpoint
    layers = sum(t.nbytes for n, t in whole.tensors.items() if n.startswith("model.layers."))
    for stage, (_, resident) in zip(seen["stages"][1:3], held[1:3], strict=True):
        assert stage["weight_bytes"] == layers / 4
        assert resident == pytest.approx(layers / 4, rel=0.03)
