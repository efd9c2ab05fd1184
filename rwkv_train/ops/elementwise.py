"""What lies between the matrix products of a block, and behind those of the head: one operation each.

Each is written once in torch, which is the specification and runs anywhere, and once in C++ (elementwise_cpu.cpp),
which reads and writes every number once. The kernels run on the CPU where they can be built, for float32, float64 and
(of the matrix products' results under autocast) bfloat16.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_train.ops import build_cpu

MOST, TOKENS = 8, 64  # mixes of one call, tokens of a job: as in elementwise_cpu.cpp


class _Mix(ctypes.Structure):  # this and the next as in elementwise_cpu.cpp
    _fields_ = [(n, ctypes.c_int64) for n in ("B", "T", "C", "N")] + [
        (n, ctypes.c_void_p) for n in ("x", "last", "m", "reset", "out")
    ]


class _MixBack(ctypes.Structure):
    _fields_ = [("g", ctypes.c_void_p * MOST)] + [(n, ctypes.c_void_p) for n in ("glast", "x", "last", "m")]


def token_shift_mix(x: Tensor, last: Tensor, reset: Tensor | None, *mixes: Tensor) -> tuple[Tensor, ...]:
    """The token shift: each token mixed with the one before it, in several ways at once.

        y_i[t] = x[t-1] + mixes_i * (x[t] - x[t-1])

    x [B,T,C]; last [B,C] the token before the first; reset [B,T] bool or None, True where a document begins: zeros
    are before its first token; mixes: C numbers each, of any shape. Returns all y_i [B,T,C], in the dtype of x or,
    under autocast, that of matrix products; and the last token [B,C] in last's dtype.
    """
    mixes = [m.reshape(-1).to(x.dtype) for m in mixes]
    if _kernels_for(x) and x.dtype != torch.bfloat16 and products_dtype(x) in build_cpu.NAMES:
        *ys, end = _ShiftMix.apply(x, last.to(x.dtype), reset, products_dtype(x), *mixes)
        return *ys, end.to(last.dtype)
    before = torch.cat([last.to(x.dtype).unsqueeze(1), x[:, :-1]], 1)
    if reset is not None:
        before = before.masked_fill(reset.unsqueeze(-1), 0)
    return *(torch.lerp(before, x, m).to(products_dtype(x)) for m in mixes), x[:, -1].to(last.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, number by number."""
    return _SquaredRelu.apply(x) if _kernels_for(x) else torch.relu(x).square()


def gate(r: Tensor, y: Tensor) -> Tensor:
    """sigmoid(r) * y, number by number; one shape and dtype."""
    return _Gate.apply(r, y) if _kernels_for(r) and r.dtype == y.dtype else torch.sigmoid(r) * y


@torch.no_grad()
def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Cross entropies [N] of softmax(logits [N,V]) and targets [N] int64, in nats, float32 (float64 of float64).

    Puts the gradient of their sum in the place of the logits, with z_loss * max(logits) added at each row's largest.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if _kernels_for(logits) and logits.is_contiguous():
        nll, (rows, width) = logits.new_empty(len(logits), dtype=wide), map(ctypes.c_int64, logits.shape)
        _run("cross_entropy", logits.dtype, logits, targets.contiguous(), nll, rows, width, ctypes.c_double(z_loss))
        return nll
    p = logits.to(wide)
    lse = p.logsumexp(-1, keepdim=True)
    nll = (lse - p.gather(1, targets[:, None]))[:, 0]
    top, where = p.max(-1, keepdim=True)
    p = p.sub_(lse).exp_() if p is logits else (p - lse).exp_()
    p.scatter_add_(1, targets[:, None], -torch.ones_like(lse))
    if z_loss:
        p.scatter_add_(1, where, z_loss * top)
    logits.copy_(p)
    return nll


def _kernels_for(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in build_cpu.NAMES and build_cpu.available()


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of x is done: autocast's, where it is on."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


def _run(kernel: str, dtype: torch.dtype, *arguments) -> None:
    """Tensors are passed by address, structures by reference."""
    assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor))
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    given = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in given]
    getattr(build_cpu.load()[0], f"{kernel}_{build_cpu.NAMES[dtype]}")(*given, torch.get_num_threads())


def _mix_inputs(x, last, reset, mixes, out) -> _Mix:
    return _Mix(*x.shape, len(mixes), *map(build_cpu.address, (x, last, mixes, reset, out)))


class _ShiftMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, reset, dtype, *mixes):
        x, last, mixes = x.contiguous(), last.contiguous(), torch.stack(mixes)
        reset = None if reset is None else reset.contiguous()
        out = x.new_empty(len(mixes), *x.shape, dtype=dtype)
        _run("mix", dtype, _mix_inputs(x, last, reset, mixes, out))
        ctx.save_for_backward(x, last, reset, mixes)
        ctx.dtype = dtype
        return *out.unbind(), x[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *g):
        x, last, reset, mixes = ctx.saved_tensors
        *g, g_end = [part.contiguous() for part in g]
        gx, glast = torch.empty_like(x), torch.empty_like(last)
        gm = mixes.new_empty(x.shape[0] * -(-x.shape[1] // TOKENS), *mixes.shape)
        pointers = (ctypes.c_void_p * MOST)(*map(build_cpu.address, g))
        back = _MixBack(pointers, *map(build_cpu.address, (g_end, gx, glast, gm)))
        _run("mix_back", ctx.dtype, _mix_inputs(x, last, reset, mixes, None), back)
        return gx, glast, None, None, *gm.sum(0).unbind()


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _run("squared_relu", x.dtype, x, y, ctypes.c_int64(x.numel()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,), g = ctx.saved_tensors, g.contiguous()
        gx = torch.empty_like(x)
        _run("squared_relu_back", x.dtype, x, g, gx, ctypes.c_int64(x.numel()))
        return gx


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, y):
        r, y = r.contiguous(), y.contiguous()
        ctx.save_for_backward(r, y)
        out = torch.empty_like(r)
        _run("gate", r.dtype, r, y, out, ctypes.c_int64(r.numel()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (r, y), g = ctx.saved_tensors, g.contiguous()
        gr, gy = torch.empty_like(r), torch.empty_like(y)
        _run("gate_back", r.dtype, r, y, g, gr, gy, ctypes.c_int64(r.numel()))
        return gr, gy
