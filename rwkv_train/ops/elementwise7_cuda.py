"""The operations of elementwise7.py on a CUDA device, by the kernels in elementwise.cu and heads.cu.

The sequences of a call have one dtype.
"""

import torch
from torch import Tensor

from rwkv_train.ops import build_cuda
from rwkv_train.ops.arguments import wide_dtype
from rwkv_train.ops.elementwise_cuda import (
    IMPLEMENTATIONS,  # noqa: F401, which has these operators, too
    WIDTH,
    Strips,
    Variant,
    add_up,
    groups,
    like,
    operator,
    pack,
    present,
    widest,
)

build_cuda.VARIANTS["elementwise7"] = lambda dtype: [
    Variant("elementwise", dtype, widest("elementwise", dtype), dtype),
    Variant("heads", dtype, widest("heads", dtype), dtype, 64),
]


def decay(raw: Tensor, w0: Tensor) -> Tensor:
    return torch.ops.rwkv_train.decay(raw, *_shaped((-1,), raw, w0))


def value_residual(v: Tensor, v_first: Tensor, raw: Tensor, v0: Tensor) -> Tensor:
    return torch.ops.rwkv_train.value_residual(v, v_first, raw, *_shaped((-1,), v, v0))


def keys(k: Tensor, raw: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.rwkv_train.keys(k, raw, *_shaped((n_head, -1), k, a0, k_k, k_a))


def head_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    return torch.ops.rwkv_train.head_output(y, r, k, v, g, *_shaped(r_k.shape, y, r_k, weight, bias))


def _shaped(shape: tuple[int, ...], like: Tensor, *parameters: Tensor) -> list[Tensor]:
    return [p.reshape(shape).to(wide_dtype(like)) for p in parameters]


def _run(name: str, parameter: Tensor, tensors: list[Tensor], sum_to: Tensor | None = None) -> None:
    """A kernel that walks tokens, on tensors of which the first is a sequence.

    parameter: one of the operation, [C], or [H,N] if it sums over heads. sum_to: where the gradients of them all go.
    """
    x = tensors[0]
    C = x.shape[-1]
    strips = Strips.of(x.numel() // C, C)
    sums = [] if sum_to is None else [strips.sums(sum_to)]
    tensors = [*tensors, *sums]
    if parameter.dim() == 2:
        H, N = parameter.shape
        variant = Variant("heads", x.dtype, pack("heads", x.dtype, N, tensors), x.dtype, N)
        share = min(WIDTH, 1 << (N // variant.vector - 1).bit_length())  # threads of a head, GROUP in heads.cu
        columns, width = -(-H // (WIDTH // share)), H
    else:
        variant = Variant("elementwise", x.dtype, pack("elementwise", x.dtype, C, tensors), x.dtype)
        columns, width = groups(C, variant), C
    strips.run(name, variant, columns, (x.numel() // C, width, strips.strip), tensors)
    if sums:
        add_up(*sums, sum_to)


def _wide(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=wide_dtype(x))


# ---- decays and the value residual

operator(
    "decay(Tensor raw, Tensor w0) -> Tensor",
    lambda raw, w0: _wide(raw),
    lambda w, raw, w0: _run("decay", w0, [raw, w0, w]),
    lambda raw, w0, g: torch.ops.rwkv_train.decay_backward(raw, w0, g),
)
operator(
    "decay_backward(Tensor raw, Tensor w0, Tensor g) -> (Tensor graw, Tensor gw0)",
    lambda raw, w0, g: tuple(like(raw, w0)),
    lambda results, raw, w0, g: _run("decay_back", w0, [raw, w0, g, results[0]], results[1]),
)
operator(
    "value_residual(Tensor v, Tensor first, Tensor raw, Tensor v0) -> Tensor",
    lambda v, first, raw, v0: v.new_empty(v.shape),
    lambda out, *inputs: _run("value_residual", inputs[3], [*inputs, out]),
    lambda *inputs: torch.ops.rwkv_train.value_residual_backward(*inputs),
)
operator(
    "value_residual_backward(Tensor v, Tensor first, Tensor raw, Tensor v0, Tensor g)"
    " -> (Tensor gv, Tensor gfirst, Tensor graw, Tensor gv0)",
    lambda v, first, raw, v0, g: tuple(like(v, first, raw, v0)),
    lambda results, *inputs: _run("value_residual_back", inputs[3], [*inputs, *results[:3]], results[3]),
)


# ---- what sums over heads


def _keys_gradient(k, raw, a0, k_k, k_a, gout, gremove, gadd):
    wide = wide_dtype(k)
    gout, gremove, gadd = present(gout, k), present(gremove, k, wide), present(gadd, k, wide)
    gk, graw, parameters = torch.ops.rwkv_train.keys_backward(k, raw, a0, k_k, k_a, gout, gremove, gadd)
    return gk, graw, *parameters.unbind()


def _head_output_gradient(*inputs):
    *sequences, parameters = torch.ops.rwkv_train.head_output_backward(*inputs)
    return *sequences, *parameters.unbind()


def _three(parameter: Tensor) -> Tensor:
    return parameter.new_empty(3, *parameter.shape)


_KEYS = "Tensor k, Tensor raw, Tensor a0, Tensor k_k, Tensor k_a"
_OUTPUT = "Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, Tensor bias"
operator(
    f"keys({_KEYS}) -> (Tensor out, Tensor remove, Tensor add)",
    lambda k, raw, a0, k_k, k_a: (k.new_empty(k.shape), _wide(k), _wide(k)),
    lambda results, *inputs: _run("keys", inputs[2], [*inputs, *results]),
    _keys_gradient,
)
operator(
    f"keys_backward({_KEYS}, Tensor gout, Tensor gremove, Tensor gadd) -> (Tensor gk, Tensor graw, Tensor gparameters)",
    lambda k, raw, a0, *rest: (*like(k, raw), _three(a0)),
    lambda results, *inputs: _run("keys_back", inputs[2], [*inputs, *results[:2]], results[2]),
)
operator(
    f"head_output({_OUTPUT}) -> Tensor",
    lambda y, *rest: y.new_empty(y.shape),
    lambda out, *inputs: _run("head_output", inputs[5], [*inputs, out]),
    _head_output_gradient,
)
operator(
    f"head_output_backward({_OUTPUT}, Tensor gout)"
    " -> (Tensor gy, Tensor gr, Tensor gk, Tensor gv, Tensor gg, Tensor gparameters)",
    lambda *inputs: (*like(*inputs[:5]), _three(inputs[5])),
    lambda results, *inputs: _run("head_output_back", inputs[5], [*inputs, *results[:5]], results[5]),
)
