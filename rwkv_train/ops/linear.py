"""Matrices times a few vectors: generation on a CPU, as fast as the memory can be read."""

import functools
import struct

import torch
from torch import Tensor

from rwkv_train.ops import build_cpu
from rwkv_train.ops.arguments import cast, wider
from rwkv_train.ops.products import PLAIN, product

MOST = 16  # vectors; with more of them the time is arithmetic, and torch's is faster


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, as torch's: x [..., K], weight [M, K], result [..., M] in the wider dtype of the two.

    A few vectors, from which no gradient is wanted, are multiplied by a kernel that reads the weight once. `product`
    sees to all others, and says what is done where the dtypes differ.
    """
    return _products([(x, weight)], False)[0] if _few(x, weight, 1) else product(x, weight)


def times(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """x weight of every pair: x [..., K], weight [K, M], results [..., M]; all by one call of that kernel."""
    dtype = pairs[0][1].dtype
    if all(weight.dtype == dtype and _few(x, weight, 0) for x, weight in pairs):
        return _products(pairs, True)
    return [product(x, weight, turned=True) for x, weight in pairs]


def most_vectors(dtype: torch.dtype) -> int:
    """How many vectors at once the kernel is good for on this machine; 0 for a dtype that it does not know."""
    if dtype not in (torch.float32, torch.bfloat16) or not build_cpu.available():
        return 0
    return MOST if dtype == torch.float32 else _most_bf16()


@functools.cache
def _most_bf16() -> int:
    return min(MOST, build_cpu.load()[0].most_vectors_bf16())


def _few(x: Tensor, weight: Tensor, summed: int) -> bool:
    """Whether the kernel takes this product, over the weight's axis `summed`."""
    width, numbers = x.shape[-1], x.numel()
    if width != weight.shape[summed] or not 0 < numbers <= MOST * width or type(weight) not in PLAIN:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if not x.is_cpu or not weight.is_contiguous() or torch.is_autocast_enabled("cpu"):
        return False
    return numbers <= most_vectors(weight.dtype) * width


def _products(pairs, turned: bool) -> list[Tensor]:
    """turned: weights are [K, M]; otherwise [M, K]."""
    xs, ys, numbers = [], [], []
    for x, weight in pairs:
        x, (rows, width) = cast(x, weight.dtype).contiguous(), weight.shape
        if turned:
            rows, width = width, rows
        y = x.new_empty((*x.shape[:-1], rows))
        numbers += (x.numel() // width, rows, width, turned, x.data_ptr(), weight.data_ptr(), y.data_ptr())
        xs.append(x)  # kept until it was read
        ys.append(y)
    table = struct.pack(f"{len(numbers)}q", *numbers)
    build_cpu.launch(f"products_{build_cpu.NAMES[ys[0].dtype]}", table, len(ys))
    return [cast(y, wider(x.dtype, y.dtype)) for y, (x, _) in zip(ys, pairs, strict=True)]
