"""What lies between the matrix products of RWKV-7's time mix: one operation each, as in elementwise.py.

Sequences are [B,T,C], of C = heads * head size channels; C numbers of a parameter may have any shape and dtype.
Whatever is stored in, it is computed in float32, or in float64 where the sequence is that.

Source: Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (arXiv:2503.14456).
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_train.ops import elementwise, elementwise7_cpu, elementwise7_cuda
from rwkv_train.ops.arguments import wide_dtype

FASTEST = math.exp(-0.5)  # of all log decays per token, the largest in size
HEAD_NORM_EPS = 64e-5
SHORTEST = 1e-12  # a key shorter than this is not made 1 long


def decay(raw: Tensor, w0: Tensor) -> Tensor:
    """The log decay -FASTEST * sigmoid(w0 + raw) of each channel, in float32 (float64 of float64)."""
    if kernels := _kernels_for(raw):
        return kernels.decay(raw, w0)
    (wide,) = _wide(raw)
    return -FASTEST * torch.sigmoid(wide + _of(w0, wide))


def value_residual(v: Tensor, v_first: Tensor, raw: Tensor, v0: Tensor) -> Tensor:
    """v + (v_first - v) * sigmoid(v0 + raw), in v's dtype: how much of the first layer's value is taken."""
    if kernels := _kernels_for(v, v_first, raw):
        return kernels.value_residual(v, v_first, raw, v0)
    wide, first, rate = _wide(v, v_first, raw)
    return torch.lerp(wide, first, torch.sigmoid(rate + _of(v0, rate))).to(v.dtype)


def keys(k: Tensor, raw: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """From the key k, what the state learns and unlearns under, with the rates a = sigmoid(a0 + raw).

    kk = k * k_k, made 1 long in each head. Returns k * (1 + (a - 1) * k_a) in k's dtype, and the operator's a and b,
    -kk and kk * a, in float32 (float64 of float64).
    """
    if kernels := _kernels_for(k, raw):
        return kernels.keys(k, raw, a0, k_k, k_a, n_head)
    wide, rates = _wide(k, raw)
    rates = torch.sigmoid(rates + _of(a0, rates))
    kk = F.normalize((wide * _of(k_k, wide)).unflatten(-1, (n_head, -1)), dim=-1, eps=SHORTEST).flatten(-2)
    return (wide * (1 + (rates - 1) * _of(k_a, wide))).to(k.dtype), -kk, kk * rates


def head_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The operator's y normalised in each head, with the current token's bonus, gated: what goes into the last product.

        (norm(y) * weight + bias + (sum of r * k * r_k over the head) * v) * g

    y, r, k, v, g [B,T,C]; r_k [H,N]. Returns [B,T,C] in y's dtype.
    """
    if kernels := _kernels_for(y, r, k, v, g):
        return kernels.head_output(y, r, k, v, g, r_k, weight, bias)
    heads = lambda x: x.unflatten(-1, r_k.shape)  # noqa: E731
    wide, r, k, v, g = _wide(y, r, k, v, g)
    out = F.layer_norm(heads(wide), r_k.shape[1:], eps=HEAD_NORM_EPS).flatten(-2)
    out = torch.addcmul(_of(bias, wide), out, _of(weight, wide))
    bonus = heads(r * k * _of(r_k, wide)).sum(-1, keepdim=True) * heads(v)
    return ((out + bonus.flatten(-2)) * g).to(y.dtype)


def _kernels_for(*sequences: Tensor) -> ModuleType | None:
    same = all(x.dtype == sequences[0].dtype for x in sequences)
    return elementwise.kernels_for(sequences[0], "elementwise7", elementwise7_cpu, elementwise7_cuda) if same else None


def _wide(*sequences: Tensor) -> list[Tensor]:
    return [x.to(wide_dtype(x)) for x in sequences]


def _of(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.reshape(-1).to(like.dtype)
