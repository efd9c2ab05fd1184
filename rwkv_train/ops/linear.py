"""A matrix times a few vectors: generation on a CPU, as fast as the memory can be read."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.ops import build_cpu

# Vectors; with more of them the time is arithmetic, and torch's is faster.
MOST = {torch.float32: 16, torch.bfloat16: 2}


class _Product(ctypes.Structure):  # as in linear_cpu.cpp
    _fields_ = [(n, ctypes.c_int64) for n in ("n", "rows", "width")] + [
        (n, ctypes.c_void_p) for n in ("x", "matrix", "y")
    ]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, as torch's: x [..., K], weight [M, K], result [..., M].

    A few vectors, from which no gradient is wanted, are multiplied by a kernel that reads the weight once.
    """
    few = x.dtype == weight.dtype and x.numel() <= MOST.get(x.dtype, 0) * x.shape[-1]
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    here = x.device.type == "cpu" and weight.is_contiguous() and not torch.is_autocast_enabled("cpu")
    if not few or wanted or not here or not build_cpu.available():
        return F.linear(x, weight)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    product = _Product(x.numel() // x.shape[-1], *weight.shape, *map(build_cpu.address, (x, weight, y)))
    getattr(build_cpu.load()[0], f"linear_{build_cpu.NAMES[x.dtype]}")(ctypes.byref(product), torch.get_num_threads())
    return y
