"""A model that gives no finite number: found where its predictions come out, and said in one line."""

import torch
from torch import Tensor

from rwkv_train.models.base import RWKV

HALF = ", which ends at 65,504; read the model with --dtype fp32 or bf16"


class NotFinite(ValueError):
    """Predictions that are nan or infinite; the message says where they come from, as far as that can be told."""


def finite(predictions: Tensor, model: RWKV) -> Tensor:
    """A model's predictions, of any shape: logits, log probabilities, losses. NotFinite if some are no number."""
    # A sum is quick, and finite only if all are; one that overflows is looked into.
    if not predictions.sum(dtype=torch.float32).isfinite() and not predictions.isfinite().all():
        name, half = str(model.dtype).removeprefix("torch."), model.dtype == torch.float16
        beyond = f"its weights are finite, what it computes from them is not in {name}" + HALF * half
        raise NotFinite(f"the model gives no finite number: {broken_weight(model) or beyond}")
    return predictions


def broken_weight(model: RWKV) -> str | None:
    """Which weight holds nan or infinity, and what to do; None if all are finite."""
    for name, weight in model.named_parameters():
        if weight.isnan().any():
            return f"its weight {name} holds nan; use another copy of the model, or an earlier checkpoint"
        if weight.isinf().any():
            half = model.dtype == torch.float16
            return f"its weight {name} holds infinity" + (f" in float16{HALF}" if half else "; use another copy of it")
    return None
