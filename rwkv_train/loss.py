"""Head and cross entropy in one, a slice of rows at a time: logits of [B, chunk, V] never exist at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # a target that is not trained
SLICE = 1 << 23  # logits held at once


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
    parts = [_row_nll(*part)[0] for part in _slices(x, weight, targets)]
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=_wide(x))


def _trained(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    keep = targets != IGNORE
    return (x, targets) if bool(keep.all()) else (x[keep], targets[keep])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slices(x: Tensor, weight: Tensor, targets: Tensor):
    rows = max(1, SLICE // weight.shape[0])
    for i in range(0, x.shape[0], rows):
        yield x[i : i + rows], weight, targets[i : i + rows]


def _row_nll(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(cross entropy [N], logits [N,V], their logsumexp [N,1]) of one slice."""
    logits = F.linear(x, weight).to(_wide(x))
    lse = logits.logsumexp(-1, keepdim=True)
    return (lse - logits.gather(1, targets[:, None]))[:, 0], logits, lse


class _HeadLoss(torch.autograd.Function):
    """Gradients are made in the forward, where the logits are at hand, and scaled in the backward."""

    @staticmethod
    def forward(ctx, x, weight, targets, z_loss):
        need_x, need_w = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros_like(weight, dtype=_wide(weight)) if need_w else None
        done = 0
        for xs, _, ts in _slices(x, weight, targets):
            nll, p, lse = _row_nll(xs, weight, ts)
            total += nll.sum(dtype=torch.float64)
            if need_x or need_w:
                if z_loss:
                    top, where = p.max(-1, keepdim=True)
                p.sub_(lse).exp_()
                p.scatter_add_(1, ts[:, None], -torch.ones_like(lse))
                if z_loss:
                    p.scatter_add_(1, where, z_loss * top)
                p = p.to(x.dtype)
            if need_x:
                dx[done : done + len(ts)] = p @ weight.to(x.dtype)
            if need_w:
                dw += p.t() @ xs
            done += len(ts)
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return total.to(_wide(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        return (
            None if dx is None else dx * g.to(dx.dtype),
            None if dw is None else dw * g.to(dw.dtype),
            None,
            None,
        )
