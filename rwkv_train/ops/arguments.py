"""What all operators ask of their arguments."""

import torch
from torch import Tensor


def check(operator: str, like: str, arguments: dict[str, tuple[Tensor, str, tuple]], reset: Tensor | None):
    """Refuse wrong shapes, dtypes and devices by the argument's name; return the dtype to compute in.

    arguments: of each name the tensor, its axes in words and its shape. All have to be where the one named `like`
    is, whose first two axes are those of reset. The dtype is float64 if any argument's is, otherwise float32.
    """
    dtype, device, lanes = torch.float32, arguments[like][0].device, arguments[like][2][:2]
    for name, (x, axes, shape) in arguments.items():
        if x.shape != shape:
            raise ValueError(f"{operator}: {name} has shape {list(x.shape)}, expected {axes} = {list(shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{operator}: {name} is {x.dtype}, expected a floating dtype")
        if x.device != device:
            raise ValueError(f"{operator}: {name} is on {x.device}, expected {device}, where {like} is")
        if x.dtype == torch.float64:
            dtype = torch.float64
    if reset is not None:
        if reset.shape != lanes:
            raise ValueError(f"{operator}: reset has shape {list(reset.shape)}, expected [B, T] = {list(lanes)}")
        if reset.dtype != torch.bool:
            raise ValueError(f"{operator}: reset is {reset.dtype}, expected torch.bool")
        if reset.device != device:
            raise ValueError(f"{operator}: reset is on {reset.device}, expected {device}, where {like} is")
    return dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a `to` with nothing to do still costs 2 us


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the numbers of x are computed with: float64 for float64, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32  # promote_types would be an operation on a tape


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype with more bytes a number, the first of two that have as many."""
    return b if b.itemsize > a.itemsize else a
