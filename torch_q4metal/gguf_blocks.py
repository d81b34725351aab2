"""The quantization blocks of GGUF as the packed tensors of MLX, no weight's value changed.

A GGUF block holds 32 weights of one row: a float16 scale d (Q4_1: and a float16 minimum m), then
codes. Each kind is an affine quantization with group size 32 (d, m are ggml's names):

    Q4_0  18 bytes  w = d * (code - 8)    scales d, biases -8 d
    Q4_1  20 bytes  w = d * code + m      scales d, biases m
    Q8_0  34 bytes  w = d * code, int8    scales d, biases -128 d, codes + 128

Multiplying by a power of two is exact, so scales and biases stay float16. GGUF keeps weight k and
weight k + 16 of a block in one byte, MLX weight k and weight k + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GROUP_SIZE = 32
Packed = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class BlockType:
    """One kind of block; ``unpack`` maps uint8 ``[rows, blocks * block_bytes]`` to MLX's triple.

    That is weight uint32 ``[rows, blocks * bits]``, scales and biases float16 ``[rows, blocks]``.
    """

    bits: int
    block_bytes: int
    unpack: Callable[[np.ndarray], Packed]


def _blocks(rows: np.ndarray, block_bytes: int) -> np.ndarray:
    return rows.reshape(rows.shape[0], -1, block_bytes)


def _halves(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at byte ``offset`` of every block: ``[rows, blocks]``."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0]


def _times(scales: np.ndarray, power_of_two: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity is for the caller to refuse
        return scales * np.float16(power_of_two)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Reorder 16 bytes of 4-bit codes a block from GGUF's pairing to MLX's: uint32 words."""
    low, high = codes & 15, codes >> 4  # weights 0..15 and 16..31
    ordered = np.concatenate([low, high], axis=-1)
    packed = ordered[..., 0::2] | ordered[..., 1::2] << 4
    return packed.reshape(codes.shape[0], -1).view("<u4")


def _q4_0(rows: np.ndarray) -> Packed:
    blocks = _blocks(rows, 18)
    scales = _halves(blocks, 0)
    return _nibbles(blocks[..., 2:]), scales, _times(scales, -8)


def _q4_1(rows: np.ndarray) -> Packed:
    blocks = _blocks(rows, 20)
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(rows: np.ndarray) -> Packed:
    blocks = _blocks(rows, 34)
    scales = _halves(blocks, 0)
    codes = blocks[..., 2:] ^ 0x80  # int8 + 128, as unsigned bytes
    return codes.reshape(rows.shape[0], -1).view("<u4"), scales, _times(scales, -128)


BLOCK_TYPES = {
    "Q4_0": BlockType(4, 18, _q4_0),
    "Q4_1": BlockType(4, 20, _q4_1),
    "Q8_0": BlockType(8, 34, _q8_0),
}
