"""Which plan decodes a model, and next logits or tokens of several texts by plan or modules."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence as List

import torch
from torch import Tensor

from .cache import Sequence
from .decode_mps import MetalDecodePlan
from .decode_plan import DecodePlan, last_rows, precisions
from .model_formats import ModelFormats
from .models.base import MATVEC_ROWS, PREFILL_CHUNK, CausalLM
from .sampling import greedy
from .self_check import check_modules

__all__ = ["DecodePlan", "forward", "is_supported", "last_rows", "likeliest", "plan_of"]


def is_supported(model: CausalLM) -> bool:
    """Whether a plan computes what the modules do.

    On the CPU: f32 activations, one precision. On MPS, where it computes in f32 whatever the
    modules do: shapes that its kernels take.
    """
    if model.device.type == "mps":
        return MetalDecodePlan.takes(model)
    on_cpu = model.device.type == "cpu"
    return on_cpu and model.dtype == torch.float32 and len(precisions(model)) <= 1


_plans: weakref.WeakKeyDictionary[CausalLM, DecodePlan] = weakref.WeakKeyDictionary()


def plan_of(model: CausalLM) -> DecodePlan | None:
    """The model's plan, built at the first call; None if it asks for eager decoding or needs it.

    Raises SelfCheckError if a Metal kernel computes wrong numbers here, of the plan or, without
    one, of the modules.
    """
    # Looked up first: to look at every module takes a millisecond, a twelfth of a small model's
    # token.
    if not model.eager and (plan := _plans.get(model)) is not None:
        return plan
    takes_plan = not model.eager and is_supported(model)
    if model.device.type == "mps":
        _watch_modules(model, decode=not takes_plan)
    if not takes_plan:
        return None
    if model.device.type == "mps":
        metal_plan = MetalDecodePlan(model)
        metal_plan.check(1)
        _plans[model] = metal_plan
    else:
        _plans[model] = DecodePlan(model)
    return _plans[model]


def _watch_modules(model: CausalLM, decode: bool) -> None:
    """Has kernels checked before modules call them; those of one text now, if modules decode."""
    if model.before_rows is not None:
        return
    check = functools.partial(check_modules, ModelFormats.of(model))
    if decode:
        check("layers", 1)
        check("layers", PREFILL_CHUNK)
        check("head", 1)
    model.before_rows = check


def forward(model: CausalLM, ids: List[List[int]], cache: List[Sequence]) -> Tensor:
    """Logits [B, V] f32, on the CPU, after the last of ids [B][L]; the tokens are appended to the
    sequences.

    Up to 8 tokens in all are decoded together; else each text is read alone.
    """
    plan = plan_of(model)
    if plan is not None and _go_together(ids, cache):
        return plan.forward(ids, cache)
    with torch.inference_mode():
        if plan is not None and plan.reads_prompts:
            for tokens, sequence in zip(ids, cache, strict=True):
                model.check_context(sequence.length + len(tokens))
            return torch.cat([plan.prefill(tokens, text) for tokens, text in zip(ids, cache)])
        return model(torch.tensor(ids), cache, logits_to_keep=1)[:, -1].cpu()


def likeliest(model: CausalLM, ids: List[List[int]], cache: List[Sequence]) -> list[int]:
    """The likeliest next tokens [B] where ``forward`` gives logits; of equals the first."""
    plan = plan_of(model)
    if plan is not None and _go_together(ids, cache):
        return plan.likeliest(ids, cache)
    return [greedy(logits) for logits in forward(model, ids, cache)]


def _go_together(ids: List[List[int]], cache: List[Sequence]) -> bool:
    """Whether one pass of a plan takes all of them."""
    pool = cache[0].pool
    return sum(map(len, ids)) <= MATVEC_ROWS and all(text.pool is pool for text in cache)
