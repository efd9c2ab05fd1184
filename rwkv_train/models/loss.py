"""Head and cross entropy in one, a slice of rows at a time: logits of [B, chunk, V] never exist at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.ops.arguments import wide_dtype
from rwkv_train.ops.elementwise import IGNORE_INDEX, cross_entropy_, products_dtype
from rwkv_train.ops.products import product

SLICE = {
    "cpu": 1 << 25,
    "cuda": 1 << 28,
}  # logits held at once: the fewer slices, the fewer passes over weight's gradient


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, multiplied: Tensor | None = None
) -> Tensor:
    """Sum of the cross entropies of softmax(x weight^T), in nats, float32 (float64 for float64 inputs).

    x [...,C], weight [V,C], targets [...] int64 with -100 = not trained. On a CPU rows without a target cost nothing;
    which they are a GPU would have to be waited for, so there they cost as much as the others.
    z_loss adds z_loss * max(logits) to the gradient at each row's largest logit, which keeps logits from
    drifting; it scales with the incoming gradient and does not change the returned value.
    multiplied: weight in the dtype of matrix products, where the caller has it already.
    """
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if not _on_gpu(x):
        x, targets = _trained(x, targets)
    if not torch.is_grad_enabled():
        return _nll(x, weight if multiplied is None else multiplied, targets).sum(dtype=torch.float64).to(wide_dtype(x))
    return _HeadLoss.apply(x, weight, targets, z_loss, multiplied)


@torch.no_grad()
def token_nll(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each trained token, in nats: a vector over the targets that are not -100, in order.

    How long it is has to be waited for on a GPU.
    """
    x, targets = _trained(x.reshape(-1, x.shape[-1]), targets.reshape(-1))
    return _nll(x, weight, targets)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _trained(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    keep = targets != IGNORE_INDEX
    return (x, targets) if bool(keep.all()) else (x[keep], targets[keep])


def _nll(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.cat([cross_entropy_(product(xs, weight), ts) for xs, ts in _slices(x, targets, weight)])


def _slices(x: Tensor, targets: Tensor, weight: Tensor):
    rows = max(1, SLICE["cuda" if _on_gpu(x) else "cpu"] // weight.shape[0])
    return zip(x.split(rows), targets.split(rows), strict=True)  # one empty pair where there is nothing


class _HeadLoss(torch.autograd.Function):
    """Gradients are made in the forward, where the logits are at hand, and scaled in the backward."""

    @staticmethod
    def forward(ctx, x, weight, targets, z_loss, multiplied):
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        dtype, dx, dw = products_dtype(x), [], None
        cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        w = multiplied if multiplied is not None else weight.to(dtype) if cast else weight
        with torch.autocast(x.device.type, enabled=False):
            for xs, ts in _slices(x.to(dtype), targets, weight):
                logits = F.linear(xs, w) if xs.dtype == w.dtype else product(xs, w)
                total += cross_entropy_(logits, ts, z_loss).sum(dtype=torch.float64)
                if ctx.needs_input_grad[0]:
                    dx.append(logits @ w if logits.dtype == w.dtype else product(logits, w, turned=True))
                if ctx.needs_input_grad[1]:
                    dw = _plus_product(dw, logits.t(), xs.to(logits.dtype))
                del logits  # before the next slice's are made
        dx = torch.cat(dx).to(x.dtype) if dx else None
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return total.to(wide_dtype(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        dx, dw = (None if part is None else part * g.to(part.dtype) for part in ctx.saved_tensors)
        return dx, dw, None, None, None


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in total's place; a sum of several products is float32 at least. total None: nothing yet.

    Where the product can add to what is there, it is read and written once; a CPU makes 16-bit products by themselves.
    """
    wide = wide_dtype(a)
    if _on_gpu(a):
        if total is None:
            return torch.mm(a, b, out_dtype=wide)
        return torch.addmm(total, a, b, out_dtype=wide, out=total)
    if total is None:
        return a @ b
    return total.addmm_(a, b) if a.dtype == wide else total.to(wide).add_(a @ b)
