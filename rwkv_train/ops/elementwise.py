"""What lies between the matrix products of a block, and behind those of the head: one operation each.

Each is written once in torch, which is the specification and runs anywhere, and once for each kind of device, where
every number is read and written once: elementwise_cpu.py and elementwise_cuda.py. Those run where they can be built.
What only RWKV-7 has is in elementwise7.py.
"""

from types import ModuleType

import torch
from torch import Tensor

from rwkv_train.ops import build_cpu, build_cuda, elementwise_cpu, elementwise_cuda
from rwkv_train.ops.arguments import wide_dtype

IGNORE_INDEX = -100  # a target that is not trained


def token_shift_mix(x: Tensor, last: Tensor, reset: Tensor | None, *mixes: Tensor) -> tuple[Tensor, ...]:
    """The token shift: each token mixed with the one before it, in several ways at once.

        y_i[t] = x[t-1] + mixes_i * (x[t] - x[t-1])

    x [B,T,C]; last [B,C] the token before the first; reset [B,T] bool or None, True where a document begins: zeros
    are before its first token; mixes: C numbers each, of any shape. Returns all y_i [B,T,C], in the dtype of x or,
    under autocast, that of matrix products; and the last token [B,C] in last's dtype.
    """
    mixes, dtype = [m.reshape(-1).to(x.dtype) for m in mixes], products_dtype(x)
    if (kernels := _kernels_for(x)) and (x.dtype, dtype) in kernels.MIXES:
        *ys, end = kernels.token_shift_mix(x, last.to(x.dtype), reset, dtype, *mixes)
        return *ys, end.to(last.dtype)
    before = torch.cat([last.to(x.dtype).unsqueeze(1), x[:, :-1]], 1)
    if reset is not None:
        before = before.masked_fill(reset.unsqueeze(-1), 0)
    return *(torch.lerp(before, x, m).to(dtype) for m in mixes), x[:, -1].to(last.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, number by number."""
    if kernels := _kernels_for(x):
        return kernels.squared_relu(x)
    x = torch.relu(x)
    return x * x  # autocast would have a square in float32


def gate(r: Tensor, y: Tensor) -> Tensor:
    """sigmoid(r) * y, number by number; one shape and dtype."""
    return kernels.gate(r, y) if (kernels := _kernels_for(r)) and r.dtype == y.dtype else torch.sigmoid(r) * y


@torch.no_grad()
def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Cross entropies [N] of softmax(logits [N,V]) and targets [N] int64, in nats, float32 (float64 of float64).

    Puts the gradient of their sum in the place of the logits, with z_loss * max(logits) added at each row's largest.
    Where the target is IGNORE_INDEX (-100) the loss is 0 and the whole row becomes 0, whatever the logits are.
    """
    if (kernels := _kernels_for(logits)) and logits.is_contiguous():
        return kernels.cross_entropy_(logits, targets, z_loss)
    p = logits.to(wide_dtype(logits))
    ignored = (targets == IGNORE_INDEX)[:, None]
    targets = targets[:, None].masked_fill(ignored, 0)
    lse = p.logsumexp(-1, keepdim=True)
    nll = (lse - p.gather(1, targets)).masked_fill(ignored, 0)[:, 0]
    top, where = p.max(-1, keepdim=True)
    p = p.sub_(lse).exp_() if p is logits else (p - lse).exp_()
    p.scatter_add_(1, targets, -torch.ones_like(lse))
    if z_loss:
        p.scatter_add_(1, where, z_loss * top)
    logits.copy_(p).masked_fill_(ignored, 0)
    return nll


def _kernels_for(x: Tensor) -> ModuleType | None:
    return kernels_for(x, "elementwise", elementwise_cpu, elementwise_cuda)


def kernels_for(x: Tensor, operator: str, cpu: ModuleType, cuda: ModuleType) -> ModuleType | None:
    """The module with the kernels for a tensor's device and dtype; None where torch does the work.

    operator: as `build_cuda.VARIANTS` knows it.
    """
    if x.device.type == "cuda":
        return cuda if x.dtype in build_cuda.TYPES and build_cuda.available(operator, x.device, x.dtype) else None
    return cpu if x.device.type == "cpu" and x.dtype in build_cpu.NAMES and build_cpu.available() else None


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of x is done: autocast's, where it is on."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype
