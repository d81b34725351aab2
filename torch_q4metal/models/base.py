"""What all model families share: the cached forward pass and attention.

A family supplies its config, its block and their modules, named as in MLX checkpoints. The residual
stream is f32 always: Qwen2.5 has activations that overflow f16.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import KVPool, Sequence, Window
from ..errors import ContextLengthError, PipelineError
from .config import DecoderConfig
from .part import Part
from .rope import rotate

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..engine import Engine

PREFILL_CHUNK = 512
"""Prompts are read in chunks that end at multiples of this position, everywhere alike."""
MATVEC_ROWS = 8
"""Up to so many rows the ops use matvec kernels, whose rows do not depend on each other."""
DEFAULT_CONTEXT = 8192


class Step:
    """One pass of ``count`` tokens in each of several sequences: positions, masks, caches.

    Everything here is worked out once and used by every layer. Without windows (no cache) the batch
    is a plain one, attention is causal within it, and gradients flow.
    """

    def __init__(
        self,
        config: DecoderConfig,
        windows: List[Window],
        count: int,
        length: int,
        device: torch.device,
    ) -> None:
        """``length``: positions of the longest text, once all chunks of this call are done."""
        rope = config.rope
        self.windows = windows
        if not windows:
            rows = [rope.rows(0, count, length)]
        elif len(windows) == 1:
            rows = [rope.rows(windows[0].start, count, length)]
        else:  # each its own length, as if it were alone
            rows = [rope.rows(window.start, count, window.end) for window in windows]
        # [sequences or 1, count, 1, head_dim]
        self.cos, self.sin = (
            torch.stack(part).unsqueeze(2).to(device) for part in zip(*rows, strict=True)
        )
        attention_is_causal = device.type == "cpu"
        self.masks = [
            _causal_mask(window.start, count, attention_is_causal, device) for window in windows
        ]

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE on x [B, L, heads, head_dim], in f32."""
        return rotate(x.float(), self.cos, self.sin)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Softmax attention in f32 of the new tokens to all that came before, themselves included.

        queries [B, L, heads, head_dim], keys and values [B, L, kv_heads, head_dim], rotated.
        Returns [B, L, heads * head_dim].
        """
        if not self.windows:
            out = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys.transpose(1, 2), values.float().transpose(1, 2),
                is_causal=True, enable_gqa=True,
            )  # fmt: skip
            return out.transpose(1, 2).flatten(2)
        new = torch.stack((keys, values))  # [2, B, L, kv_heads, head_dim]
        # Sequence by sequence: a text's numbers then do not depend on its company.
        outs = [
            _attend_one(queries[i : i + 1], *window.update(layer, new[:, i]), mask)
            for i, (window, mask) in enumerate(zip(self.windows, self.masks, strict=True))
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_one(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """queries [1, L, heads, d]; keys and values [1, kv_heads, T, d]; returns [1, L, heads * d]."""
    _, count, heads, dim = queries.shape
    if queries.device.type != "cpu":
        return _attend_by_head(queries[0], keys[0], values[0], mask)
    if count == 1:  # the query heads of a KV head become its rows, which spares expanding keys
        grouped = queries.view(1, keys.shape[1], heads // keys.shape[1], dim)
        return F.scaled_dot_product_attention(grouped, keys, values).view(1, 1, heads * dim)
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, attn_mask=mask,
        is_causal=mask is None, enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2).reshape(1, count, heads * dim)


def _attend_by_head(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """queries [L, heads, d], keys and values [kv_heads, T, d]; returns [1, L, heads * d].

    For GPUs. Scores of one KV head at a time: those of all would take gigabytes at long contexts.
    """
    count, heads, dim = queries.shape
    # [kv_heads, query heads of one, L, d]
    grouped = queries.transpose(0, 1).unflatten(0, (len(keys), -1)) * dim**-0.5
    outs = []
    for own, head_keys, head_values in zip(grouped, keys, values, strict=True):
        scores = own @ head_keys.T
        if mask is not None:
            scores += mask
        outs.append(scores.softmax(-1) @ head_values)
    return torch.cat(outs).transpose(0, 1).reshape(1, count, heads * dim)


def _causal_mask(
    start: int, count: int, attention_is_causal: bool, device: torch.device
) -> Tensor | None:
    """[count, start + count] f32; None where nothing is masked, or ``is_causal`` says the same."""
    if count == 1 or (start == 0 and attention_is_causal):
        return None
    # Made on the CPU: some of torch's triu subtract infinities.
    return torch.full((count, start + count), float("-inf")).triu_(start + 1).to(device)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in f32 and given out in ``dtype``."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.float(), self.eps).to(self.dtype)


class Layers(nn.ModuleList):
    """Blocks under the names that they have in the whole model, whose layer ``first`` is theirs."""

    def __init__(self, blocks: List[nn.Module], first: int) -> None:
        super().__init__()
        for layer, block in enumerate(blocks, first):
            self.add_module(str(layer), block)


class Decoder(nn.Module):
    """Embedding, blocks, final norm: everything but the head. None where ``part`` has no use for
    the embedding or the norm.
    """

    def __init__(
        self, config: DecoderConfig, blocks: List[nn.Module], dtype: torch.dtype, part: Part
    ) -> None:
        super().__init__()
        self.embed_tokens: Any = None
        if part.has_table:
            # Not nn.Embedding(...): its random values take 1.4 s of imports on the meta device.
            table = torch.empty(config.vocab_size, config.hidden_size)
            self.embed_tokens = nn.Embedding.from_pretrained(table)
        self.layers = Layers(blocks, part.layers.start)
        self.norm: Any = None
        if part.has_head:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Token ids [B, L], or the residual stream that the part before gave, to the residual
        stream [B, L, hidden_size] in f32, before the final norm.
        """
        h = x if x.is_floating_point() else self.embed_tokens(x)
        for layer in self.layers:
            h = layer(h, step)
        return h


class CausalLM(nn.Module):
    """A decoder with its head. ``model(ids, cache)`` gives logits.

    ``config``        the family's own config
    ``dtype``         of activations; the residual stream is f32 whatever it is
    ``kv_dtype``      of cached keys and values
    ``max_kv_size``   longest text, prompt and answer together
    ``checkpoint``    where the weights came from, None for a model that was not loaded
    ``eager``         True: generation decodes with these modules too, instead of the decode plan
    ``part``          the layers that are here; all of them, unless it is a pipeline stage
    ``engine``        what computes tokens where ``part`` is not the whole model (pipeline/)
    ``before_rows``   called with "layers" or "head" and a number of rows before they go through
    """

    config_class: ClassVar[Any]
    block: ClassVar[type[nn.Module]]

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype = torch.float32,
        max_kv_size: int | None = None,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        layers = config.num_hidden_layers
        self.part = part or Part(range(layers), layers, config.tied)
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.max_kv_size = max_kv_size or min(config.max_position_embeddings, DEFAULT_CONTEXT)
        self.checkpoint: Checkpoint | None = None
        self.eager = False
        self.engine: Engine | None = None
        self.before_rows: Callable[[str, int], object] | None = None
        self.pool_class: type[KVPool] = KVPool
        # Blocks count the layers of the KV cache, which holds only theirs.
        blocks = [self.block(config, layer, dtype) for layer in range(len(self.part.layers))]
        self.model = Decoder(config, blocks, dtype, self.part)
        if self.part.has_head and not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, ids: Tensor, cache: List[Sequence] | None = None, *, logits_to_keep: int = 0
    ) -> Tensor:
        """Logits [B, L, vocab_size] in f32 of token ids [B, L].

        With ``cache``, one Sequence a row: ids continue these texts, and keys and values are
        appended to them. Each chunk is in the cache as a whole or not at all, whatever interrupts.
        ``logits_to_keep``: only that many last positions get logits; 0 means all.
        Raises ContextLengthError, before anything is computed, if a text would not fit.
        """
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or 0 in ids.shape:
            raise ValueError(
                f"ids must be int64 [B, L] with B and L above 0, not {ids.dtype} {list(ids.shape)}"
            )
        if not self.part.is_whole:
            raise PipelineError(
                f"this rank holds layers {self.part.layers.start} to {self.part.layers.stop - 1} "
                f"of {self.part.total} only; call the generate functions, which use all ranks."
            )
        count = ids.shape[1]
        if cache is None:
            self._announce("layers", ids.numel())
            hidden = self.model(
                ids.to(self.device), Step(self.config, [], count, count, self.device)
            )
            return self.logits(hidden[:, -logits_to_keep:])
        if len(cache) != ids.shape[0] or len({id(sequence) for sequence in cache}) != len(cache):
            raise ValueError(
                f"cache must hold {ids.shape[0]} different sequences, one for each row of ids"
            )
        for sequence in cache:
            self.check_context(sequence.length + count)
            sequence.reserve(count)
        with torch.no_grad():
            if ids.numel() <= MATVEC_ROWS:
                hidden = self._advance(ids, cache, max(s.length for s in cache) + count)
                return self.logits(hidden[:, -logits_to_keep:])
            # One sequence at a time, so that a chunk never mixes texts.
            parts = [
                self._prefill(ids[i : i + 1], sequence, logits_to_keep or count)
                for i, sequence in enumerate(cache)
            ]
        return torch.cat(parts)

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return next(self.parameters()).device

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] in f32 of the residual stream [..., hidden_size]."""
        self._announce("head", hidden.shape[:-1].numel())
        x = self.model.norm(hidden)
        head = self.model.embed_tokens.as_linear if self.config.tied else self.lm_head
        return head(x).float()

    def make_pool(self, max_tokens: int | None = None) -> KVPool:
        """A KV pool of this model's shape, by default for one text of ``max_kv_size`` tokens."""
        config = self.config
        return self.pool_class(
            len(self.part.layers), config.num_key_value_heads, config.head_dim, self.kv_dtype,
            max_tokens or self.max_kv_size, self.device,
        )  # fmt: skip

    def make_cache(self, max_tokens: int | None = None) -> Sequence:
        """An empty sequence in a pool of its own."""
        return Sequence(self.make_pool(max_tokens))

    def check_context(self, length: int) -> None:
        """Raises ContextLengthError if a text of so many tokens is longer than the context."""
        if length > self.max_kv_size:
            raise ContextLengthError(
                f"a text of {length} tokens is longer than the context of {self.max_kv_size}; "
                "shorten it or load the model with a larger max_kv_size."
            )

    def read(self, tokens: List[int], sequence: Sequence, length: int) -> None:
        """Puts tokens, at most a chunk of them, into the sequence; nobody wants their logits.

        ``length``: positions of the text once the whole prompt is done.
        """
        with torch.no_grad():
            self._advance(torch.tensor([tokens]), [sequence], length)

    def _prefill(self, ids: Tensor, sequence: Sequence, keep: int) -> Tensor:
        """Logits [1, keep, V] of the last ``keep`` of ids [1, L], which go through in chunks."""
        count, done, logits = ids.shape[1], 0, []
        length = sequence.length + count
        while done < count:
            end = min(count, done + PREFILL_CHUNK - sequence.length % PREFILL_CHUNK)
            hidden = self._advance(ids[:, done:end], [sequence], length)
            if end > count - keep:
                logits.append(self.logits(hidden[:, max(0, count - keep - done) :]))
            done = end
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def _advance(self, ids: Tensor, cache: List[Sequence], length: int) -> Tensor:
        """One pass: residual stream [B, L, hidden_size]. The tokens are appended at its end."""
        hidden = self.advance(ids, cache, length)
        for sequence, tokens in zip(cache, ids.tolist(), strict=True):
            sequence.append(tokens)
        return hidden

    def advance(self, x: Tensor, cache: List[Sequence], length: int) -> Tensor:
        """What the layers here make of ids [B, L] or a residual stream [B, L, hidden_size], f32.

        Keys and values are stored, but the sequences do not count them yet. ``length``: positions
        of the longest text, once all chunks of this call are done.
        """
        count = x.shape[1]
        self._announce("layers", len(x) * count)
        windows = [Window(sequence, count) for sequence in cache]
        step = Step(self.config, windows, count, length, self.device)
        return self.model(x.to(self.device), step)

    def _announce(self, part: str, rows: int) -> None:
        if self.before_rows is not None:
            self.before_rows(part, rows)
