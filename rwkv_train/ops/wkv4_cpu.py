"""WKV-4 by the C++ kernel that build_cpu.py builds."""

import ctypes

import torch
from torch.autograd.function import once_differentiable

from rwkv_train.ops.build_cpu import address, demand, run


class _Inputs(ctypes.Structure):  # this and the next two as in wkv4_cpu.cpp
    _fields_ = [(n, ctypes.c_int64) for n in ("B", "T", "C")] + [
        (n, ctypes.c_void_p) for n in ("w", "u", "k", "v", "state", "reset")
    ]


class _Results(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("y", "state", "exact", "lse", "last")]


class _Gradients(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_void_p) for n in ("exact", "lse", "state", "gy", "gstate", "last", "w", "u", "k", "v", "initial")
    ]


def wkv4(w, u, k, v, state, reset=None):
    """WKV-4 by the C++ kernel; see `rwkv_train.wkv.wkv4`. CPU tensors.

    w, u and state are float32, k and v float32 or bfloat16; or all are float64.
    """
    demand("wkv4")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (w, u, k, v, state)):
        return _WKV4.apply(w, u, k, v, state, reset)
    y, state, *_ = _forward(w, u, k, v, state, reset, save=False)
    return y, state


def _inputs(w, u, k, v, state, reset) -> _Inputs:
    return _Inputs(*k.shape, *map(address, (w, u, k, v, state, reset)))


def _forward(w, u, k, v, state, reset, save: bool):
    """y, the state, and with `save` what the backward needs (see Results in wkv4_cpu.cpp): exact, lse and last."""
    w, u, k, v, state = (x.contiguous() for x in (w, u, k, v, state))
    reset = None if reset is None else reset.contiguous()
    y, out = torch.empty_like(k), torch.empty_like(state)
    exact = lse = last = None
    if save:
        lse, last = state.new_empty(k.shape), k.new_empty(k.shape[0], k.shape[2], dtype=torch.int32)
        exact = y if k.dtype == state.dtype else state.new_empty(k.shape)
    results = _Results(*map(address, (y, out, exact, lse, last)))
    run("wkv4_forward", k.dtype, _inputs(w, u, k, v, state, reset), results)
    return y, out, exact, lse, last


class _WKV4(torch.autograd.Function):
    """The kernel with its hand-written gradient, from the formulas in wkv4.h."""

    @staticmethod
    def forward(ctx, w, u, k, v, state, reset):
        y, out, exact, lse, last = _forward(w, u, k, v, state, reset, save=True)
        ctx.save_for_backward(w, u, k, v, state, reset, exact, out, lse, last)
        ctx.set_materialize_grads(False)
        return y, out

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gstate):
        w, u, k, v, state, reset, exact, out, lse, last = (
            None if x is None else x.contiguous() for x in ctx.saved_tensors
        )
        gy = torch.zeros_like(k) if gy is None else gy.contiguous()
        gstate = None if gstate is None else gstate.contiguous()
        gw, gu = w.new_empty(2, k.shape[0], k.shape[2])
        gk, gv, initial = torch.empty_like(k), torch.empty_like(v), torch.empty_like(state)
        gradients = _Gradients(*map(address, (exact, lse, out, gy, gstate, last, gw, gu, gk, gv, initial)))
        run("wkv4_backward", k.dtype, _inputs(w, u, k, v, state, reset), gradients)
        return gw.sum(0), gu.sum(0), gk, gv, initial, None
