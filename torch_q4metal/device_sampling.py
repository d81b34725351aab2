"""How the sampling kernel of a device draws a token (csrc/metal/plan_sample.metal), in PyTorch.

For texts on that device whose logits the host wants to see or change: with the same seed they draw
the same tokens. The noise of a token at a position depends on nothing but the seed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from . import _extension
from .sampling import LogitsSampler, Sampler, SamplingParams, apply_filters, greedy

_LOW = 0xFFFFFFFF
_ROUNDS = 10


def packed(settings: Iterable[tuple[SamplingParams, int]]) -> Tensor:
    """int32 [R, 6]: each row's settings and seed as csrc/metal/plan_launch.h's struct Sampling."""
    rows = b"".join(
        struct.pack("<fffIQ", s.temperature, s.top_p, s.min_p, min(s.top_k, _LOW), seed % (1 << 64))
        for s, seed in settings
    )
    return torch.frombuffer(bytearray(rows), dtype=torch.int32).view(-1, 6)


def sampler(sampling: SamplingParams, seed: int, position: int) -> Sampler:
    """What ``draw`` does for the token after the one at ``position``, in the extension."""
    if sampling.temperature == 0:
        return greedy
    return _PositionSampler(sampling, seed % (1 << 64), position)


class _PositionSampler(LogitsSampler):
    def __init__(self, sampling: SamplingParams, seed: int, position: int) -> None:
        draw = _extension.load().draw_token_as_device
        super().__init__(draw, sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k)
        self._place = seed, position

    def __call__(self, logits: Tensor) -> int:
        return self.draw(logits, *self._place)


def draw(logprobs: Tensor, sampling: SamplingParams, seed: int, position: int) -> int:
    """The token that follows the one at ``position``, of log-probabilities [V] f32 on the CPU."""
    if sampling.temperature == 0:
        return greedy(logprobs)
    filtered = apply_filters(logprobs, sampling.top_p, sampling.min_p, sampling.top_k)
    kept = (filtered > -torch.inf).nonzero().squeeze(1)
    uniform = ((philox(kept, position, seed) >> 9) + 0.5) / (1 << 23)
    gumbel = -(-uniform.double().log()).log()
    best = (logprobs[kept].double() / sampling.temperature + gumbel).argmax()
    return int(kept[best])


def philox(tokens: Tensor, position: int, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., 2011), the first of its four numbers: int64 [N] below 2**32.

    The counter is (token, position), the key is the seed, 64 bits.
    """
    zero = torch.zeros_like(tokens)
    x, y, z, w = tokens, zero + (position & _LOW), zero + (position >> 32), zero
    key, other_key = seed & _LOW, seed >> 32 & _LOW
    for _ in range(_ROUNDS):
        # Products wrap around as 64 bits do; the mask takes the sign away again.
        one, two = x * 0xD2511F53, z * 0xCD9E8D57
        x, y = (two >> 32 & _LOW) ^ y ^ key, two & _LOW
        z, w = (one >> 32 & _LOW) ^ w ^ other_key, one & _LOW
        key, other_key = (key + 0x9E3779B9) & _LOW, (other_key + 0xBB67AE85) & _LOW
    return x
