"""LoRA on a packed model: ``python examples/lora.py [MODEL_DIRECTORY] [STEPS]``.

The weights stay packed, also in the backward pass; only the small adapters are trained. Without
a directory the built-in SmolLM2 is taken. Needs ``pip install transformers``.
"""

import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from torch_q4metal import Q4Linear, load_packed
from torch_q4metal.builtin_model import builtin_model
from torch_q4metal.tokenizer import Tokenizer

TEXT = "The tower of the old harbour is painted green, and its keeper is called Marguerite Okonkwo."


class Lora(nn.Module):
    """``base(x) + x A^T B^T`` with A ``[rank, K]`` and B ``[N, rank]``; B begins as zero."""

    def __init__(self, base: Q4Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + (x.float() @ self.a.T @ self.b.T).to(y.dtype)


def load(path: Path) -> transformers.PreTrainedModel:
    """The packed model of an MLX directory, with adapters on its query and value projections."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_config(config)
    load_packed(model, path).requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.q_proj = Lora(block.self_attn.q_proj)
        block.self_attn.v_proj = Lora(block.self_attn.v_proj)
    return model


def train(model: nn.Module, ids: Tensor, steps: int) -> list[float]:
    """Trains on one batch of token ids ``[B, L]``; returns the loss before each step."""
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {len(losses)}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else builtin_model()
    ids = torch.tensor([Tokenizer.from_dir(path).encode(TEXT)])
    train(load(path), ids, steps=int(sys.argv[2]) if len(sys.argv) > 2 else 20)
