"""The operations of elementwise7.py by the C++ kernels in elementwise7_cpu.cpp, for float32, float64 and bfloat16.

The sequences of a call have one dtype. The backward has the inputs saved and computes the rest again.
"""

import struct

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_train.ops import build_cpu
from rwkv_train.ops.arguments import wide_dtype
from rwkv_train.ops.elementwise_cpu import call

ROWS = 32  # of a job, as in elementwise7_cpu.cpp


def decay(raw: Tensor, w0: Tensor) -> Tensor:
    return call(_Decay, raw, w0)


def value_residual(v: Tensor, v_first: Tensor, raw: Tensor, v0: Tensor) -> Tensor:
    return call(_ValueResidual, v, v_first, raw, v0)


def keys(k: Tensor, raw: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    return call(_Keys, k, raw, a0, k_k, k_a, n_head)


def head_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    return call(_HeadOutput, y, r, k, v, g, r_k, weight, bias)


def _run(kernel: str, heads: int, *tensors: Tensor | None) -> None:
    """The first of the tensors is a sequence; they stand as in the kernel's structure, None where it reads nothing."""
    assert all([x is None or x.is_contiguous() for x in tensors])
    channels = tensors[0].shape[-1]
    sizes = tensors[0].numel() // channels, heads, channels // heads
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    structure = struct.pack(f"{3 + len(tensors)}q", *sizes, *addresses)
    build_cpu.launch(f"{kernel}_{build_cpu.NAMES[tensors[0].dtype]}", structure)


def _flat(parameters: tuple[Tensor, ...], like: Tensor) -> list[Tensor]:
    wide = wide_dtype(like)
    return [p if p.dtype == wide and p.is_contiguous() else p.to(wide).contiguous() for p in parameters]


def _sums(count: int, like: Tensor) -> Tensor:
    """Room for each job's gradients of parameters."""
    channels = like.shape[-1]
    return like.new_empty(-(-like.numel() // channels // ROWS), count, channels, dtype=wide_dtype(like))


def _totals(sums: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    return [g.view(p.shape).to(p.dtype) for g, p in zip(sums.sum(0), parameters, strict=True)]


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, w0):
        raw = raw.contiguous()
        w = torch.empty_like(raw, dtype=wide_dtype(raw))
        _run("decay", 1, raw, *_flat((w0,), raw), w)
        ctx.save_for_backward(raw, w0)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx, gw):
        raw, w0 = ctx.saved_tensors
        graw, sums = torch.empty_like(raw), _sums(1, raw)
        _run("decay_back", 1, raw, *_flat((w0,), raw), None, gw.contiguous(), graw, sums)
        return graw, *_totals(sums, (w0,))


class _ValueResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, v_first, raw, v0):
        v, v_first, raw = v.contiguous(), v_first.contiguous(), raw.contiguous()
        out = torch.empty_like(v)
        _run("value_residual", 1, v, v_first, raw, *_flat((v0,), v), out)
        ctx.save_for_backward(v, v_first, raw, v0)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        *sequences, v0 = ctx.saved_tensors
        gradients, sums = [torch.empty_like(x) for x in sequences], _sums(1, gout)
        inputs = *sequences, *_flat((v0,), gout)
        _run("value_residual_back", 1, *inputs, None, gout.contiguous(), *gradients, sums)
        return *gradients, *_totals(sums, (v0,))


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, raw, a0, k_k, k_a, n_head):
        k, raw = k.contiguous(), raw.contiguous()
        key, remove, add = torch.empty_like(k), *(torch.empty_like(k, dtype=wide_dtype(k)) for _ in range(2))
        _run("keys", n_head, k, raw, *_flat((a0, k_k, k_a), k), key, remove, add)
        ctx.save_for_backward(k, raw, a0, k_k, k_a)
        ctx.n_head = n_head
        return key, remove, add

    @staticmethod
    @once_differentiable
    def backward(ctx, *arriving):
        k, raw, *parameters = ctx.saved_tensors
        gk, graw, sums = torch.empty_like(k), torch.empty_like(raw), _sums(3, k)
        arriving = [g.contiguous() for g in arriving]
        inputs = k, raw, *_flat(parameters, k)
        _run("keys_back", ctx.n_head, *inputs, None, None, None, *arriving, gk, graw, sums)
        return gk, graw, *_totals(sums, parameters), None


class _HeadOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, r, k, v, g, r_k, weight, bias):
        sequences, parameters = [x.contiguous() for x in (y, r, k, v, g)], (r_k, weight, bias)
        out = torch.empty_like(sequences[0])
        _run("head_output", len(r_k), *sequences, *_flat(parameters, out), out)
        ctx.save_for_backward(*sequences, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        saved = ctx.saved_tensors  # asked for once: a checkpointed block gives them no second time
        sequences, parameters = saved[:5], saved[5:]
        gradients, sums = [torch.empty_like(x) for x in sequences], _sums(3, gout)
        inputs = *sequences, *_flat(parameters, gout)
        _run("head_output_back", len(parameters[0]), *inputs, None, gout.contiguous(), *gradients, sums)
        return *gradients, *_totals(sums, parameters)
