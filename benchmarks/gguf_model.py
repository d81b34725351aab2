"""Writes a generated MLX checkpoint as GGUF, Q4_0 or Q4_1 throughout, with the very same weights.

Blocks of 32 weights share the scale of their group of 64. Q4_0 has room for a scale alone: the
checkpoint's biases are -8 * scale, as Q4_0's are by definition. The embedding (and with it a tied
head) gets the same type as every matrix. No tokenizer: engines are driven with token ids.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from mlx_model import GROUP_SIZE
from shapes import Shape

from torch_q4metal.checkpoint import Checkpoint

BLOCK = 32
TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_1": gguf.GGMLQuantizationType.Q4_1}
_FILE_TYPES = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1}
_PIECE_BYTES = 16 << 20
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(shape: Shape, kind: str, mlx: Path, path: Path) -> None:
    """``kind`` is a key of TYPES, ``mlx`` the folder that write_mlx made."""
    checkpoint = Checkpoint.open(mlx)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen2")
    _add_metadata(writer, shape, kind)
    tensors = [name for name in checkpoint.tensors if not name.endswith((".scales", ".biases"))]
    for name in tensors:
        _declare(writer, checkpoint, name, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in tensors:
        writer.write_tensor_data(_data(checkpoint, name, kind))
    writer.close()
    partial.rename(path)


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, kind: str) -> None:
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")


def _gguf_name(name: str) -> str:
    path, _, suffix = name.rpartition(".")
    if path in _OUTER:
        return f"{_OUTER[path]}.{suffix}"
    layer, _, inner = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[inner]}.{suffix}"


def _declare(writer: gguf.GGUFWriter, checkpoint: Checkpoint, name: str, kind: str) -> None:
    shape = checkpoint.info(name).shape
    if len(shape) == 1:
        writer.add_tensor_info(_gguf_name(name), shape, np.dtype(np.float32), 4 * shape[0])
        return
    row_bytes = shape[1] * 8 // BLOCK * _block_bytes(kind)
    # With a raw dtype the shape is that of the bytes.
    byte_shape, size = (shape[0], row_bytes), shape[0] * row_bytes
    writer.add_tensor_info(_gguf_name(name), byte_shape, np.dtype(np.uint8), size, TYPES[kind])


def _data(checkpoint: Checkpoint, name: str, kind: str) -> np.ndarray:
    """The bytes of one tensor; the largest, a head of 7B, takes 340 MB."""
    if len(checkpoint.info(name).shape) == 1:
        return checkpoint.tensor(name).float().numpy()
    path = name.removesuffix(".weight")
    weight, scales, biases = (
        checkpoint.tensor(f"{path}.{suffix}") for suffix in ("weight", "scales", "biases")
    )
    if kind == "q4_0" and not torch.equal(biases, scales * -8):
        raise ValueError(f"{path}: Q4_0 cannot hold biases other than -8 * scale")
    blocks = weight.shape[1] * 8 // BLOCK
    data = np.empty((weight.shape[0], blocks, _block_bytes(kind)), np.uint8)
    step = max(1, _PIECE_BYTES // (4 * weight.shape[1]))
    for begin in range(0, weight.shape[0], step):
        rows = slice(begin, begin + step)
        data[rows, :, :2] = _f16_of_blocks(scales[rows])
        if kind == "q4_1":
            data[rows, :, 2:4] = _f16_of_blocks(biases[rows])
        data[rows, :, -BLOCK // 2 :] = _reordered(weight[rows].numpy().view(np.uint8))
    return data


def _block_bytes(kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[TYPES[kind]][1])


def _f16_of_blocks(groups: torch.Tensor) -> np.ndarray:
    """The f16 of every group once for each of its blocks: uint8 [rows, blocks, 2]."""
    values = np.repeat(groups.numpy(), GROUP_SIZE // BLOCK, axis=1)
    return values.view(np.uint8).reshape(*values.shape, 2)


def _reordered(rows: np.ndarray) -> np.ndarray:
    """MLX keeps weights k and k + 1 in one byte, GGUF k and k + 16: uint8 [rows, blocks, 16]."""
    pairs = rows.reshape(rows.shape[0], -1, BLOCK // 2)
    codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:2], BLOCK)
    return codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
