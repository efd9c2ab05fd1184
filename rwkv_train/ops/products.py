"""Matrix products of two number formats, and in formats that the processor cannot multiply in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_train.ops.arguments import cast, wide_dtype, wider

PIECE = 1 << 22  # numbers of a weight that are converted at once
MOST = 16  # vectors for which torch's slow product of 16-bit numbers still beats converting the weight
HALVES = (torch.bfloat16, torch.float16)
PLAIN = (nn.Parameter, Tensor)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is kept in 8 or 4 bits a number, by torchao; its dtype is what it computes in."""
    return type(weight) not in PLAIN and (hasattr(weight, "qdata") or hasattr(weight, "quantized_data"))


def dequantised(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a weight in 8 or 4 bits stands for, in a dtype, or in its own."""
    dtype = dtype or weight.dtype
    return weight.dequantize(dtype) if hasattr(weight, "qdata") else _of_4_bits(weight).to(dtype)


def _of_4_bits(weight: Tensor) -> Tensor:
    """torchao's get_original_weight, to the bit, in a third of the time: it looks up both numbers of a byte at once."""
    pairs = torch.stack([weight.nf4.repeat_interleave(16), weight.nf4.repeat(16)], 1)
    scales = weight.dequantize_scalers(weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size)
    numbers = F.embedding(weight.quantized_data.int(), pairs).view(weight.n_blocks, -1)
    return (numbers * scales[:, None]).view(weight.shape)


def quantised_bytes(weight: Tensor) -> int:
    """Bytes of a weight in 8 or 4 bits, its scales among them."""
    parts = weight.__tensor_flatten__()[0]
    return sum(getattr(weight, name).nbytes for name in parts)


def as_wide(weight: Tensor) -> Tensor:
    """A weight in float32, if it is not float64: itself where it is that already."""
    wide = wide_dtype(weight)
    return dequantised(weight, wide) if is_quantised(weight) else weight.to(wide)


def product(x: Tensor, weight: Tensor, turned: bool = False) -> Tensor:
    """x weight^T, or x weight if `turned`, in the wider dtype of the two; autocast decides where it is on.

    x [..., K], weight [M, K] (turned: [K, M]). The weight's dtype is that of the product: x is rounded to it. Where
    there is no quick one in 16 bits, and for a weight in 8 or 4 bits, it is float32, made of the weight piece by piece;
    no copy of it is kept for the gradients.
    """
    if torch.is_autocast_enabled(x.device.type) and not is_quantised(weight):
        return torch.matmul(x, weight) if turned else F.linear(x, weight)
    if _by_pieces(x, weight):
        return _ByPieces.apply(x, weight, turned)
    if x.dtype != weight.dtype and not is_quantised(weight):
        return cast(product(x.to(weight.dtype), weight, turned), wider(x.dtype, weight.dtype))
    return torch.matmul(x, weight) if turned else F.linear(x, weight)


def _by_pieces(x: Tensor, weight: Tensor) -> bool:
    if not (is_quantised(weight) or (weight.is_cpu and weight.dtype in HALVES and not _multiplies(weight.dtype))):
        return False
    differentiated = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return differentiated or x.numel() > MOST * x.shape[-1]


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has quick products of these 16-bit numbers."""
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


class _ByPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, turned):
        ctx.turned, ctx.save = turned, ctx.needs_input_grad[1]
        ctx.save_for_backward(x if ctx.save else x[..., :0], weight)
        dtype = _inside(weight)
        y = x.new_empty(*x.shape[:-1], weight.shape[turned], dtype=wider(x.dtype, weight.dtype))
        x = x.to(dtype)
        for at, piece in _pieces(weight, turned, dtype):
            y[..., at] = F.linear(x, piece)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        dtype, gx, gw = _inside(weight), None, None
        g = g.to(dtype)
        if ctx.needs_input_grad[0]:
            gx = sum(g[..., at] @ piece for at, piece in _pieces(weight, ctx.turned, dtype)).to(x.dtype)
        if ctx.save:
            gw = (g.flatten(0, -2).t() @ x.to(dtype).flatten(0, -2)).to(weight.dtype)
            gw = gw.t() if ctx.turned else gw
        return gx, gw, None


def _inside(weight: Tensor) -> torch.dtype:
    """The dtype in which a product by pieces is computed."""
    return wide_dtype(weight) if weight.is_cpu else weight.dtype


def _pieces(weight: Tensor, turned: bool, dtype: torch.dtype):
    """A weight [M,K], or [K,M] if turned, in a dtype, some of its rows at a time: (which ones, those)."""
    rows = dequantised(weight, dtype) if is_quantised(weight) else weight
    rows = rows.t() if turned else rows
    step = len(rows) if is_quantised(weight) else max(1, PIECE // rows.shape[1])
    for i in range(0, len(rows), step):
        yield slice(i, i + step), rows[i : i + step].to(dtype)
