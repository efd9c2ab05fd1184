"""The operations of elementwise.py by the C++ kernels in elementwise_cpu.cpp, for float32, float64 and bfloat16."""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_train.ops import build_cpu
from rwkv_train.ops.arguments import wide_dtype

MOST, TOKENS = 8, 64  # mixes of one call, tokens of a job: as in elementwise_cpu.cpp
MIXES = {(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)}  # of x, to y


class _Mix(ctypes.Structure):  # this and the next as in elementwise_cpu.cpp
    _fields_ = [(n, ctypes.c_int64) for n in ("B", "T", "C", "N")] + [
        *((n, ctypes.c_void_p) for n in ("x", "last", "reset", "out")),
        ("m", ctypes.c_void_p * MOST),
    ]


class _MixBack(ctypes.Structure):
    _fields_ = [("g", ctypes.c_void_p * MOST)] + [(n, ctypes.c_void_p) for n in ("glast", "x", "last", "m")]


def token_shift_mix(x: Tensor, last: Tensor, reset: Tensor | None, dtype: torch.dtype, *mixes: Tensor):
    """All mixes [B,T,C] in `dtype`, and the last token [B,C]; x, last and the mixes [C] float32 or float64."""
    return call(_ShiftMix, x, last, reset, dtype, *mixes)


def squared_relu(x: Tensor) -> Tensor:
    return call(_SquaredRelu, x)


def gate(r: Tensor, y: Tensor) -> Tensor:
    return call(_Gate, r, y)


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    nll = logits.new_empty(len(logits), dtype=wide_dtype(logits))
    rows, width = map(ctypes.c_int64, logits.shape)
    _run("cross_entropy", logits.dtype, logits, targets.contiguous(), nll, rows, width, ctypes.c_double(z_loss))
    return nll


class _Nothing:
    """In the place of a Function's context where no gradient is wanted."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def call(function: type[torch.autograd.Function], *arguments):
    """The result of a Function; where no gradient is wanted its forward alone, which costs less."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return function.apply(*arguments)
    return function.forward(_Nothing(), *arguments)


def _run(kernel: str, dtype: torch.dtype, *arguments) -> None:
    """Tensors are passed by address, structures by reference."""
    assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor))
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    given = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in given]
    build_cpu.launch(f"{kernel}_{build_cpu.NAMES[dtype]}", *given)


def _mix_inputs(x, last, reset, mixes, out) -> _Mix:
    return _Mix(*x.shape, len(mixes), *map(build_cpu.address, (x, last, reset, out)), _addresses(mixes))


def _addresses(tensors) -> ctypes.Array:
    return (ctypes.c_void_p * MOST)(*map(build_cpu.address, tensors))


class _ShiftMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, reset, dtype, *mixes):
        x, last, *mixes = [part.contiguous() for part in (x, last, *mixes)]
        reset = None if reset is None else reset.contiguous()
        out = x.new_empty(len(mixes), *x.shape, dtype=dtype)
        _run("mix", dtype, _mix_inputs(x, last, reset, mixes, out))
        ctx.save_for_backward(x, last, reset, *mixes)
        ctx.dtype = dtype
        return *out.unbind(), x[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *g):
        x, last, reset, *mixes = ctx.saved_tensors
        *g, g_end = [part.contiguous() for part in g]
        gx, glast = torch.empty_like(x), torch.empty_like(last)
        gm = x.new_empty(x.shape[0] * -(-x.shape[1] // TOKENS), len(mixes), x.shape[2])
        back = _MixBack(_addresses(g), *map(build_cpu.address, (g_end, gx, glast, gm)))
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
