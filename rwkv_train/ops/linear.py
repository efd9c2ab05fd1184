"""Matrices times a few vectors: generation on a CPU, as fast as the memory can be read."""

import functools
import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.ops import build_cpu

MOST = 16  # vectors; with more of them the time is arithmetic, and torch's is faster


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, as torch's: x [..., K], weight [M, K], result [..., M].

    A few vectors, from which no gradient is wanted, are multiplied by a kernel that reads the weight once.
    """
    if not _few(x, weight, 1):
        return F.linear(x, weight)
    x = x.contiguous()
    product, y = _product(x, weight, *weight.shape, False)
    _run(x.dtype, product)
    return y


def times(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """x weight of every pair: x [..., K], weight [K, M], results [..., M]; all by one call of that kernel."""
    dtype = pairs[0][0].dtype
    if not all(x.dtype == dtype and _few(x, weight, 0) for x, weight in pairs):
        return [torch.matmul(x, weight) for x, weight in pairs]
    xs = [x.contiguous() for x, _ in pairs]  # kept until they were read
    products = [_product(x, weight, *weight.shape[::-1], True) for x, (_, weight) in zip(xs, pairs, strict=True)]
    _run(dtype, *(product for product, _ in products))
    return [y for _, y in products]


def most_vectors(dtype: torch.dtype) -> int:
    """How many vectors at once the kernel is good for on this machine; 0 for a dtype that it does not know."""
    kernels = dtype in (torch.float32, torch.bfloat16) and build_cpu.available()
    return _most(dtype) if kernels else 0


@functools.cache
def _most(dtype: torch.dtype) -> int:
    return MOST if dtype == torch.float32 else min(MOST, build_cpu.load()[0].most_vectors_bf16())


def _few(x: Tensor, weight: Tensor, summed: int) -> bool:
    """Whether the kernel takes this product, over the weight's axis `summed`."""
    width = x.shape[-1]
    if x.dtype != weight.dtype or width != weight.shape[summed] or not 0 < x.numel() <= MOST * width:
        return False
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if wanted or not x.is_cpu or not weight.is_contiguous() or torch.is_autocast_enabled("cpu"):
        return False
    return x.numel() <= most_vectors(x.dtype) * width


def _product(x: Tensor, weight: Tensor, rows: int, width: int, turned: bool) -> tuple[bytes, Tensor]:
    """What linear_cpu.cpp calls Product, and where its result will be."""
    y = x.new_empty((*x.shape[:-1], rows))
    addresses = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    return struct.pack("7q", x.numel() // width, rows, width, turned, *addresses), y


def _run(dtype: torch.dtype, *products: bytes) -> None:
    kernel = getattr(build_cpu.load()[0], f"products_{build_cpu.NAMES[dtype]}")
    kernel(b"".join(products), len(products), torch.get_num_threads())
