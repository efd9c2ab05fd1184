"""Head and cross entropy in one, a slice of rows at a time: logits of [B, chunk, V] never exist at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.ops.elementwise import IGNORE_INDEX, cross_entropy_, products_dtype

SLICE = 1 << 25  # logits held at once


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum of the cross entropies of softmax(x weight^T), in nats, float32 (float64 for float64 inputs).

    x [...,C], weight [V,C], targets [...] int64 with -100 = not trained. Rows without a target cost nothing.
    z_loss adds z_loss * max(logits) to the gradient at each row's largest logit, which keeps logits from
    drifting; it scales with the incoming gradient and does not change the returned value.
    """
    if not torch.is_grad_enabled():
        return token_nll(x, weight, targets).sum(dtype=torch.float64).to(_wide(x))
    x, targets = _trained(x, targets)
    return _HeadLoss.apply(x, weight, targets, z_loss)


@torch.no_grad()
def token_nll(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each trained token, in nats: a vector over the targets that are not -100, in order."""
    x, targets = _trained(x, targets)
    return torch.cat([cross_entropy_(F.linear(xs, weight), ts) for xs, ts in _slices(x, targets, weight)])


def _trained(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    keep = targets != IGNORE_INDEX
    return (x, targets) if bool(keep.all()) else (x[keep], targets[keep])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slices(x: Tensor, targets: Tensor, weight: Tensor):
    rows = max(1, SLICE // weight.shape[0])
    return zip(x.split(rows), targets.split(rows), strict=True)  # one empty pair where there is nothing


class _HeadLoss(torch.autograd.Function):
    """Gradients are made in the forward, where the logits are at hand, and scaled in the backward."""

    @staticmethod
    def forward(ctx, x, weight, targets, z_loss):
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        dtype = products_dtype(x)
        w, dx, dw = weight.to(dtype), [], None
        with torch.autocast(x.device.type, enabled=False):
            for xs, ts in _slices(x.to(dtype), targets, weight):
                logits = F.linear(xs, w)
                total += cross_entropy_(logits, ts, z_loss).sum(dtype=torch.float64)
                if ctx.needs_input_grad[0]:
                    dx.append(logits @ w)
                if ctx.needs_input_grad[1]:
                    part = logits.t() @ xs
                    dw = part if dw is None else dw.to(_wide(x)).add_(part)
        dx = torch.cat(dx).to(x.dtype) if dx else None
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return total.to(_wide(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        dx, dw = (None if part is None else part * g.to(part.dtype) for part in ctx.saved_tensors)
        return dx, dw, None, None
