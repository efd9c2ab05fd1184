"""WKV-7 by the C++ kernel that build_cpu.py builds."""

import ctypes

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rwkv_train.ops.build_cpu import address, demand, run

CHUNK = 16  # tokens, as in wkv7_back.h; of each chunk the forward keeps the state before it
_WIDTH = 16  # the kernel takes heads of a multiple of this size


class _Inputs(ctypes.Structure):  # this and the next two as in wkv7_cpu.cpp and wkv7_back.h
    _fields_ = [(n, ctypes.c_int64) for n in ("B", "T", "H", "N", "apart")] + [
        (n, ctypes.c_void_p) for n in ("r", "k", "v", "w", "a", "b", "state", "reset")
    ]


class _Results(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("y", "state", "saved", "removed")]


class _Gradients(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_void_p) for n in ("gy", "gstate", "saved", "removed", "r", "k", "v", "w", "a", "b", "initial")
    ]


def wkv7(r, w, k, v, a, b, state, reset=None):
    """WKV-7 by the C++ kernel; see `rwkv_train.wkv.wkv7`. CPU tensors.

    w, a, b and state are float32, and r, k and v float32 or bfloat16; or all are float64.
    """
    demand("wkv7")
    N = r.shape[-1]
    if missing := -N % _WIDTH:  # channels of zeros, which read and change nothing
        r, w, k, v, a, b = (F.pad(x, (0, missing)) for x in (r, w, k, v, a, b))
        state = F.pad(state, (0, missing, 0, missing))
    inputs = (r, w, k, v, a, b, state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        y, state = _WKV7.apply(*inputs, reset)
    else:
        y, state, *_ = _forward(*inputs, reset, save=False)
    return (y[..., :N], state[..., :N, :N]) if missing else (y, state)


def _inputs(r, w, k, v, a, b, state, reset) -> _Inputs:
    return _Inputs(*r.shape, state.stride(0), *map(address, (r, k, v, w, a, b, state, reset)))


def _forward(r, w, k, v, a, b, state, reset, save: bool):
    """y, the state, and what the backward needs: contiguous inputs, and with `save` what the kernel kept."""
    (B, T, H, N), saved, removed = r.shape, None, None
    if T > 1 or save or state.stride()[1:] != (N * N, N, 1):  # a token's may be a layer's part of several lanes' state
        state = state.contiguous()
    sequences = [x.contiguous() for x in (r, w, k, v, a, b)]
    inputs = *sequences, state, None if reset is None else reset.contiguous()
    y, out = torch.empty_like(sequences[0]), state.new_empty(state.shape)
    if save:
        saved, removed = state.new_empty(B, H, -(-T // CHUNK), N, N), state.new_empty(r.shape)
    run("wkv7_forward", r.dtype, _inputs(*inputs), _Results(*map(address, (y, out, saved, removed))))
    return y, out, inputs, saved, removed


class _WKV7(torch.autograd.Function):
    """The kernel with its hand-written gradient, from the formulas in wkv7_back.h."""

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, state, reset):
        y, out, inputs, *kept = _forward(r, w, k, v, a, b, state, reset, save=True)
        ctx.save_for_backward(*inputs, *kept)
        ctx.set_materialize_grads(False)
        return y, out

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gstate):
        *inputs, saved, removed = ctx.saved_tensors
        gy = torch.zeros_like(inputs[0]) if gy is None else gy.contiguous()
        gstate = None if gstate is None else gstate.contiguous()
        gradients = r, w, k, v, a, b, initial = [torch.empty_like(x) for x in inputs[:-1]]
        pointers = _Gradients(*map(address, (gy, gstate, saved, removed, r, k, v, w, a, b, initial)))
        run("wkv7_backward", gy.dtype, _inputs(*inputs), pointers)
        return *gradients, None
