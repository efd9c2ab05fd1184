"""The operations of elementwise.py on a CUDA device, by the kernels in elementwise.cu and mix.cu."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.ops import build_cuda
from rwkv_train.ops.arguments import wide_dtype
from rwkv_train.ops.build_cuda import NATIVE, TYPES, library, refuse

WIDTH, ROWS, MOST = 32, 8, 6  # as in elementwise_gpu.h and mix.cu; WIDTH * ROWS threads are a block, at most
KERNELS = {
    "mix": ("mix", "mix_back"),
    "elementwise": tuple(
        name + back for name in ("squared_relu", "gate", "decay", "value_residual") for back in ("", "_back")
    ),
    "cross_entropy": ("cross_entropy",),
    "heads": ("keys", "keys_back", "head_output", "head_output_back"),
}
# Of x and of what is mixed from it.
MIXES = {(dtype, dtype) for dtype in TYPES} | {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}
ALIGNED = 32  # bytes of the largest pack
IMPLEMENTATIONS: dict[str, Callable] = {}  # of the operators, by name

# These are for a later look at the clock; none of them changes what is computed, but for rounding.
PACK = {"mix": 4, "elementwise": 8, "heads": 4, "cross_entropy": 8}  # numbers that a thread reads at once, at most
STRIP, SHORT_STRIP = 16, 4  # tokens that a thread walks
MANY = 1 << 22  # tokens x channels that keep a GPU busy with long strips


class Variant(NamedTuple):
    """What a cubin is built for: how sequences and mixes are stored, numbers of a pack, and the head size."""

    name: str
    dtype: torch.dtype
    vector: int
    out: torch.dtype
    size: int = 0

    @property
    def source(self) -> Path:
        return NATIVE / f"{self.name}.cu"

    @property
    def kernels(self) -> tuple[str, ...]:
        return KERNELS[self.name]

    @property
    def macros(self) -> list:
        types = {"WKV_X": TYPES[self.dtype], "WKV_Y": TYPES[self.out]}
        return [*types.items(), ("WKV_V", str(self.vector)), ("WKV_N", str(self.size))]


def widest(name: str, dtype: torch.dtype) -> int:
    """Numbers that a thread reads at once where it can; dtype: the smallest that is stored in."""
    return min(PACK[name], 16 // dtype.itemsize)


def pack(name: str, dtype: torch.dtype, width: int, tensors) -> int:
    """The same, or 1 where rows of `width` numbers or tensors do not begin where packs may."""
    vector = widest(name, dtype)
    numbers = (x for x in tensors if x is not None and x.dtype is not torch.bool)
    return 1 if width % vector or any(x.data_ptr() % ALIGNED for x in numbers) else vector


build_cuda.VARIANTS["elementwise"] = lambda dtype: [
    *(Variant(name, dtype, widest(name, dtype), dtype) for name in ("elementwise", "cross_entropy")),
    *(Variant("mix", x, widest("mix", y), y) for x, y in sorted(MIXES, key=str) if x == dtype),
]


class Strips(NamedTuple):
    """How tokens are shared out: `rows` of a block walk `strip` tokens each, and `tiles` of them are all."""

    strip: int
    rows: int
    tiles: int

    @classmethod
    def of(cls, tokens: int, channels: int) -> "Strips":
        strip = STRIP if tokens * channels >= MANY else SHORT_STRIP
        rows = max(1, min(ROWS, -(-tokens // strip)))
        return cls(strip, rows, -(-tokens // (strip * rows)))

    def run(self, name: str, variant: Variant, groups: int, sizes, tensors) -> None:
        """A kernel that has a block for each tile and group of channels."""
        build_cuda.call(name, variant, self.tiles * groups, (WIDTH, self.rows), sizes, tensors)

    def sums(self, to: Tensor) -> Tensor:
        """Room for each tile's part of what is to be added up."""
        return to[None] if self.tiles == 1 else to.new_empty(self.tiles, *to.shape)


def add_up(sums: Tensor, to: Tensor) -> None:
    if sums.shape[0] != 1:
        torch.sum(sums, 0, out=to)


def operator(schema: str, room: Callable, launch: Callable, gradient: Callable | None = None) -> None:
    """Register an operator.

    room(*arguments) makes the tensors of its results and launch(results, *arguments) has them filled. What the
    gradients need are the arguments alone: gradient(*arguments, *gradients of the results, None where there are none)
    returns those of the arguments. Without it the operator is itself a gradient, and has none.
    """
    name = schema.partition("(")[0]
    library.define(schema)

    def run(*arguments):
        arguments = [_contiguous(x) for x in arguments]
        results = room(*arguments)
        launch(results, *arguments)
        return results

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

    def differentiate(ctx, *gradients):
        return gradient(*ctx.saved_tensors, *gradients)

    IMPLEMENTATIONS[name] = run
    library.impl(name, run, "CUDA")
    torch.library.register_fake(f"rwkv_train::{name}", room, lib=library)
    backward, setup = (differentiate, save) if gradient else (refuse(name), None)
    torch.library.register_autograd(f"rwkv_train::{name}", backward, setup_context=setup, lib=library)


def _contiguous(x):
    if isinstance(x, list):
        return [part.contiguous() for part in x]
    return x.contiguous() if isinstance(x, Tensor) else x


def like(*tensors: Tensor) -> list[Tensor]:
    """Room for results that are as these."""
    return [x.new_empty(x.shape) for x in tensors]


def present(gradient: Tensor | None, result: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient, or zeros as of a result."""
    return result.new_zeros(result.shape, dtype=dtype) if gradient is None else gradient


# ---- the token shift


def token_shift_mix(x: Tensor, last: Tensor, reset: Tensor | None, dtype: torch.dtype, *mixes: Tensor):
    """All mixes [B,T,C] in `dtype`, and the last token [B,C]; x, last and the mixes [C] in one dtype."""
    mixes = torch.stack(mixes).to(wide_dtype(x))
    ys, end = torch.ops.rwkv_train.token_shift_mix(x, last, reset, mixes, dtype)
    return *ys, end


def _mix_room(x, last, reset, mixes, dtype):
    return [x.new_empty(x.shape, dtype=dtype) for _ in mixes], last.new_empty(last.shape)


def _mix(results, x, last, reset, mixes, dtype):
    ys, end = results
    _run_mix("mix", dtype, (x, last, reset, mixes, end), ys)


def _mix_back_room(x, last, reset, mixes, gend, gys):
    return tuple(like(x, last, mixes))


def _mix_back(results, x, last, reset, mixes, gend, gys):
    gx, glast, gmixes = results
    sums = _strips(x).sums(gmixes)
    _run_mix("mix_back", gys[0].dtype, (x, last, reset, mixes, gend, gx, glast, sums), gys)
    add_up(sums, gmixes)


def _run_mix(name, dtype, tensors, streams):
    """tensors begin with x, last, reset and mixes; streams are the mixes or their gradients."""
    x, _, _, mixes, *_ = tensors
    (B, T, C), n, strips = x.shape, len(mixes), _strips(x)
    variant = Variant("mix", x.dtype, pack("mix", dtype, C, (*tensors, *streams)), dtype)
    absent = [None] * (MOST - n)
    strips.run(name, variant, groups(C, variant), (B, T, C, strips.strip, n), (*tensors, *streams, *absent))


def _strips(x: Tensor) -> Strips:
    return Strips.of(x.shape[0] * x.shape[1], x.shape[2])


def groups(C: int, variant: Variant) -> int:
    """Of channels: each has a pack for each thread abreast."""
    return -(-C // (WIDTH * variant.vector))


def _mix_gradient(x, last, reset, mixes, _, gys, gend):
    dtype = next((g.dtype for g in gys if g is not None), x.dtype)
    gys = [present(g, x, dtype) for g in gys]
    gx, glast, gmixes = torch.ops.rwkv_train.token_shift_mix_backward(x, last, reset, mixes, gend, gys)
    return gx, glast, None, gmixes, None


operator(
    "token_shift_mix(Tensor x, Tensor last, Tensor? reset, Tensor mixes, ScalarType dtype)"
    " -> (Tensor[] ys, Tensor end)",
    _mix_room,
    _mix,
    _mix_gradient,
)
operator(
    "token_shift_mix_backward(Tensor x, Tensor last, Tensor? reset, Tensor mixes, Tensor? gend, Tensor[] gys)"
    " -> (Tensor gx, Tensor glast, Tensor gmixes)",
    _mix_back_room,
    _mix_back,
)


# ---- number by number


def squared_relu(x: Tensor) -> Tensor:
    return torch.ops.rwkv_train.squared_relu(x)


def gate(r: Tensor, y: Tensor) -> Tensor:
    return torch.ops.rwkv_train.gate(r, y)


def _each(name: str, *tensors: Tensor) -> None:
    """A kernel that has a thread for each pack of numbers."""
    x, size = tensors[0], tensors[0].numel()
    variant = Variant("elementwise", x.dtype, pack("elementwise", x.dtype, 0, tensors), x.dtype)
    build_cuda.call(name, variant, -(-size // (WIDTH * ROWS * variant.vector)), (WIDTH, ROWS), (size,), tensors)


operator(
    "squared_relu(Tensor x) -> Tensor",
    lambda x: x.new_empty(x.shape),
    lambda y, x: _each("squared_relu", x, y),
    lambda x, g: torch.ops.rwkv_train.squared_relu_backward(x, g),
)
operator(
    "squared_relu_backward(Tensor x, Tensor g) -> Tensor",
    lambda x, g: x.new_empty(x.shape),
    lambda gx, x, g: _each("squared_relu_back", x, g, gx),
)
operator(
    "gate(Tensor r, Tensor y) -> Tensor",
    lambda r, y: r.new_empty(r.shape),
    lambda out, r, y: _each("gate", r, y, out),
    lambda r, y, g: torch.ops.rwkv_train.gate_backward(r, y, g),
)
operator(
    "gate_backward(Tensor r, Tensor y, Tensor g) -> (Tensor gr, Tensor gy)",
    lambda r, y, g: tuple(like(r, y)),
    lambda results, r, y, g: _each("gate_back", r, y, g, *results),
)


# ---- cross entropy


def cross_entropy_(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    return torch.ops.rwkv_train.cross_entropy_(logits, targets, z_loss)


def _losses(logits, targets, z_loss):
    return logits.new_empty(len(logits), dtype=wide_dtype(logits))


def _cross_entropy(logits, targets, z_loss):
    assert logits.is_contiguous()  # the gradient goes there
    nll, (rows, size) = _losses(logits, targets, z_loss), logits.shape
    variant = Variant("cross_entropy", logits.dtype, pack("cross_entropy", logits.dtype, size, (logits,)), logits.dtype)
    tensors = (logits, targets.to(torch.int64).contiguous(), nll)
    build_cuda.call("cross_entropy", variant, rows, (WIDTH, ROWS), (size, float(z_loss)), tensors)
    return nll


library.define("cross_entropy_(Tensor(a!) logits, Tensor targets, float z_loss) -> Tensor")
library.impl("cross_entropy_", _cross_entropy, "CUDA")
torch.library.register_fake("rwkv_train::cross_entropy_", _losses, lib=library)
IMPLEMENTATIONS["cross_entropy_"] = _cross_entropy
