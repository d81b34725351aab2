"""Writes an MLX checkpoint as an OpenVINO model, the way optimum-intel and NNCF export one.

``.peers/openvino/bin/python openvino_model.py MLX_FOLDER FOLDER``; models.py calls it. It needs
openvino and numpy alone, where an export of a Hugging Face model would need torch, transformers,
optimum and NNCF, and for a 7B model minutes and 30 GB.

Weights are u4 (u8) -> Convert(f16) -> Subtract(zero point) -> Multiply(scale f16) -> Reshape ->
Convert(f32) -> MatMul: NNCF's int4 asymmetric format, group size 64, which the CPU plugin takes as
it is. A generated checkpoint keeps its weights to the bit, its zero points being 8. Real ones have
biases that are no multiple of the scale and are quantized anew, the embedding to 8 bits a row as
NNCF does. Keys and values are states of the model, selected by ``beam_idx``; only the last position
gets logits, as openvino-genai arranges it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

GROUP = 64
MLX_TO_NUMPY = {"F16": np.float16, "F32": np.float32, "U32": np.uint32}


class Tensors:
    """The tensors of a one-file safetensors checkpoint, mapped."""

    def __init__(self, folder: Path) -> None:
        self._data = np.memmap(folder / "model.safetensors", np.uint8, "r")
        size = int(self._data[:8].view("<u8")[0])
        self._header = json.loads(bytes(self._data[8 : 8 + size]))
        self._begin = 8 + size

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header[name]
        begin, end = (self._begin + offset for offset in entry["data_offsets"])
        return self._data[begin:end].view(MLX_TO_NUMPY[entry["dtype"]]).reshape(entry["shape"])


class Decoder:
    """The graph of a Llama or Qwen2 decoder, built from its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors = Tensors(folder)
        config = self.config
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.sinks: list[Any] = []

    def model(self) -> ov.Model:
        ids = op.parameter([-1, -1], ov.Type.i64, name="input_ids")
        mask = op.parameter([-1, -1], ov.Type.i64, name="attention_mask")
        positions = op.parameter([-1, -1], ov.Type.i64, name="position_ids")
        self.beams = op.parameter([-1], ov.Type.i32, name="beam_idx")
        inputs = [ids, mask, positions, self.beams]
        for node in inputs:
            node.output(0).set_names({node.friendly_name})
        self.batch = op.gather(op.shape_of(ids), _i64([0]), _i64(0))
        table = self._weight("model.embed_tokens")
        x = op.gather(table, op.convert(ids, ov.Type.i32), _i32(0))
        self.cos, self.sin = self._rope(positions)
        self.mask = _causal_mask(ids, mask)
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(x, layer)
        x = op.slice(x, _i64([-1]), _i64([np.iinfo(np.int64).max]), _i64([1]), _i64([1]))
        x = self._norm(x, "model.norm")
        head = self._weight("lm_head") if "lm_head.weight" in self.tensors else table
        logits = op.matmul(x, head, False, True)
        logits.output(0).set_names({"logits"})
        return ov.Model([op.result(logits)], self.sinks, inputs, "decoder")

    def _layer(self, x: Any, layer: int) -> Any:
        at = f"model.layers.{layer}"
        h = self._norm(x, f"{at}.input_layernorm")
        q = self._rotated(self._heads(self._linear(h, f"{at}.self_attn.q_proj"), self.heads))
        k = self._rotated(self._heads(self._linear(h, f"{at}.self_attn.k_proj"), self.kv_heads))
        v = self._heads(self._linear(h, f"{at}.self_attn.v_proj"), self.kv_heads)
        k = self._cached(k, f"past_key_values.{layer}.key")
        v = self._cached(v, f"past_key_values.{layer}.value")
        scale = op.constant(np.float32(self.head_dim**-0.5))
        out = op.scaled_dot_product_attention(
            q, self._repeated(k), self._repeated(v), self.mask, scale, causal=False
        )
        out = op.reshape(
            op.transpose(out, _i64([0, 2, 1, 3])), _i64([0, 0, self.heads * self.head_dim]), True
        )
        x = op.add(x, self._linear(out, f"{at}.self_attn.o_proj"))
        h = self._norm(x, f"{at}.post_attention_layernorm")
        gate = op.swish(self._linear(h, f"{at}.mlp.gate_proj"))
        h = op.multiply(gate, self._linear(h, f"{at}.mlp.up_proj"))
        return op.add(x, self._linear(h, f"{at}.mlp.down_proj"))

    def _norm(self, x: Any, path: str) -> Any:
        weight = self.tensors[f"{path}.weight"].astype(np.float32).reshape(1, 1, -1)
        eps = np.float32(self.config["rms_norm_eps"]).reshape(1, 1, 1)
        mean = op.reduce_mean(op.power(x, _f32([[[2.0]]])), _i64([-1]), True)
        root = op.sqrt(op.add(mean, op.constant(eps)))
        normed = op.multiply(x, op.divide(_f32([[[1.0]]]), root))
        return op.multiply(op.constant(weight), normed)

    def _linear(self, x: Any, path: str) -> Any:
        y = op.matmul(x, self._weight(path), False, True)
        if f"{path}.bias" not in self.tensors:
            return y
        return op.add(y, op.constant(self.tensors[f"{path}.bias"].astype(np.float32)))

    def _heads(self, x: Any, count: int) -> Any:
        split = op.reshape(x, _i64([0, 0, count, self.head_dim]), True)
        return op.transpose(split, _i64([0, 2, 1, 3]))

    def _rope(self, positions: Any) -> tuple[Any, Any]:
        half = np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim
        theta = np.float32(self.config.get("rope_theta", 10000.0))
        frequencies = op.constant((theta**-half).reshape(1, -1, 1).astype(np.float32))
        places = op.convert(op.unsqueeze(positions, _i64(1)), ov.Type.f32)
        angles = op.transpose(op.matmul(frequencies, places, False, False), _i64([0, 2, 1]))
        both = op.concat([angles, angles], -1)
        return op.unsqueeze(op.cos(both), _i64(1)), op.unsqueeze(op.sin(both), _i64(1))

    def _rotated(self, x: Any) -> Any:
        half, end, one, axis = self.head_dim // 2, np.iinfo(np.int64).max, _i64([1]), _i64([3])
        low = op.slice(x, _i64([0]), _i64([half]), one, axis)
        high = op.slice(x, _i64([half]), _i64([end]), one, axis)
        turned = op.concat([op.multiply(high, _f32([[[[-1.0]]]])), low], -1)
        return op.add(op.multiply(x, self.cos), op.multiply(turned, self.sin))

    def _cached(self, new: Any, name: str) -> Any:
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, self.kv_heads, -1, self.head_dim])
        info.data_type = ov.Type.f32
        info.variable_id = name
        variable = Variable(info)
        shape = op.concat([self.batch, _i64([self.kv_heads, 0, self.head_dim])], 0)
        empty = op.broadcast(op.constant(np.float32(0)), shape)
        past = op.gather(op.read_value(empty, variable), self.beams, _i64(0))
        whole = op.concat([past, new], 2)
        self.sinks.append(op.assign(whole, variable))
        return whole

    def _repeated(self, x: Any) -> Any:
        """Each KV head once for every query head that reads it.

        As a product with ones, a form that the plugin folds into its attention (2026.4 folds no
        Broadcast and would run softmax and both products as separate layers).
        """
        if self.heads == self.kv_heads:
            return x
        ones = op.constant(np.ones((1, 1, self.heads // self.kv_heads, 1, 1), np.float32))
        spread = op.multiply(op.unsqueeze(x, _i64(2)), ones)
        return op.reshape(spread, _i64([0, self.heads, -1, self.head_dim]), True)

    def _weight(self, path: str) -> Any:
        """f32 [N, K] as a chain that the plugin recognises as compressed weights."""
        words, scales, biases = (
            self.tensors[f"{path}.{suffix}"] for suffix in ("weight", "scales", "biases")
        )
        quantization = self.config["quantization"]
        bits = quantization.get(path, quantization)["bits"]
        if bits == 8:
            return _bytes_a_row(_dequantized(words, scales, biases, bits))
        rows, columns = scales.shape[0], words.shape[1] * 8
        if np.array_equal(biases, scales * np.float16(-8)):
            zeros = np.full(scales.size // 2, 0x88, np.uint8)
            return _grouped(np.asarray(words).view(np.uint8), scales, zeros, rows, columns)
        return _quantized(_dequantized(words, scales, biases, bits))


def _grouped(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, rows: int, columns: int
) -> Any:
    """``codes`` and ``zeros`` hold two 4-bit values a byte, the first in the low half."""
    groups = columns // GROUP
    weight = op.convert(_u4(codes, [rows, groups, GROUP]), ov.Type.f16)
    zero = op.convert(_u4(zeros, [rows, groups, 1]), ov.Type.f16)
    scale = op.constant(np.ascontiguousarray(scales, np.float16).reshape(rows, groups, 1))
    full = op.multiply(op.subtract(weight, zero), scale)
    return op.convert(op.reshape(full, _i64([rows, columns]), False), ov.Type.f32)


def _quantized(dense: np.ndarray) -> Any:
    """NNCF's int4 asymmetric: from the smallest to the largest value, zero included."""
    rows, columns = dense.shape
    groups = dense.reshape(rows, -1, GROUP)
    low = np.minimum(groups.min(-1, keepdims=True), 0)
    high = np.maximum(groups.max(-1, keepdims=True), 0)
    scale = np.maximum((high - low) / 15, 1e-7).astype(np.float16).astype(np.float32)
    zero = np.clip(np.round(-low / scale), 0, 15)
    codes = np.clip(np.round(groups / scale) + zero, 0, 15).astype(np.uint8)
    return _grouped(_pairs(codes), scale, _pairs(zero.astype(np.uint8)), rows, columns)


def _bytes_a_row(dense: np.ndarray) -> Any:
    """NNCF's int8 asymmetric, one scale a row: what it does to embeddings and heads."""
    low = np.minimum(dense.min(-1, keepdims=True), 0)
    high = np.maximum(dense.max(-1, keepdims=True), 0)
    scale = np.maximum((high - low) / 255, 1e-7).astype(np.float16).astype(np.float32)
    zero = np.clip(np.round(-low / scale), 0, 255)
    codes = np.clip(np.round(dense / scale) + zero, 0, 255).astype(np.uint8)
    weight = op.convert(op.constant(codes), ov.Type.f16)
    zeros = op.convert(op.constant(zero.astype(np.uint8)), ov.Type.f16)
    full = op.multiply(op.subtract(weight, zeros), op.constant(scale.astype(np.float16)))
    return op.convert(full, ov.Type.f32)


def _dequantized(
    words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int
) -> np.ndarray:
    codes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1)
    groups = codes.reshape(*scales.shape, -1).astype(np.float32)
    full = groups * scales[..., None].astype(np.float32) + biases[..., None].astype(np.float32)
    return full.reshape(scales.shape[0], -1)


def _pairs(codes: np.ndarray) -> np.ndarray:
    flat = codes.reshape(-1, 2)
    return flat[:, 0] | flat[:, 1] << 4


def _u4(data: np.ndarray, shape: list[int]) -> Any:
    flat = np.ascontiguousarray(data).reshape(-1)
    return op.constant(ov.Tensor(flat, ov.Shape(shape), ov.Type.u4), shared_memory=False)


def _causal_mask(ids: Any, mask: Any) -> Any:
    """f32 [B, 1, L, S] to be added to scores: what comes later or is masked gets the minimum."""
    count = op.gather(op.shape_of(ids), _i64(1), _i64(0))
    total = op.gather(op.shape_of(mask), _i64(1), _i64(0))
    rows = op.range(op.subtract(total, count), total, _i64(1), ov.Type.i64)
    columns = op.range(_i64(0), total, _i64(1), ov.Type.i64)
    past = op.less_equal(op.unsqueeze(columns, _i64(0)), op.unsqueeze(rows, _i64(1)))
    kept = op.unsqueeze(op.convert(mask, ov.Type.boolean), _i64([1, 2]))
    allowed = op.logical_and(op.unsqueeze(past, _i64([0, 1])), kept)
    lowest = op.constant(np.finfo(np.float32).min)
    return op.select(allowed, op.constant(np.float32(0)), lowest)


def _i64(value: Any) -> Any:
    return op.constant(np.array(value, np.int64))


def _i32(value: Any) -> Any:
    return op.constant(np.array(value, np.int32))


def _f32(value: Any) -> Any:
    return op.constant(np.array(value, np.float32))


def main() -> None:
    mlx, folder = Path(sys.argv[1]), Path(sys.argv[2])
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    ov.save_model(Decoder(mlx).model(), partial / "model.xml", compress_to_fp16=False)
    partial.rename(folder)


if __name__ == "__main__":
    main()
