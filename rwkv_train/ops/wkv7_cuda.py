"""WKV-7 on a CUDA device, by the kernels in wkv7.cu that build_cuda.py builds."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.ops import build_cuda

SOURCE = build_cuda.NATIVE / "wkv7.cu"
SHARE, ANCHOR = 4, 64  # as in wkv7_gpu.h and wkv7.cu
LARGEST = 512  # head size that the kernels' shared memory holds
MANY = 1 << 13  # lanes x channels that keep a GPU busy with two rows a thread; for a later look at the clock
WIDE = 512  # bytes of a row of the state; of longer ones the registers bear one a thread


class Variant(NamedTuple):
    """What a cubin is built for: how r, k, v and y are stored, the head size, and rows of a thread."""

    dtype: torch.dtype
    size: int
    rows: int

    @classmethod
    def of(cls, r: Tensor) -> "Variant":
        B, _, H, N = r.shape
        bytes_of_a_row = N * max(r.element_size(), 4)  # of the state, which has at least 32 bits
        return cls(r.dtype, N, 2 if B * H * N >= MANY and bytes_of_a_row <= WIDE else 1)

    @property
    def source(self) -> Path:
        return SOURCE

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("forward", "gradients", "reads", "writes")

    @property
    def macros(self) -> list:
        return [("WKV_X", build_cuda.TYPES[self.dtype]), ("WKV_N", str(self.size)), ("WKV_P", str(self.rows))]

    def run(self, name: str, r: Tensor, *others: Tensor | None) -> None:
        """One of the kernels: each has some blocks for each head."""
        B, T, H, N = r.shape
        pieces = 1 if N % (32 * self.rows) else N // (32 * self.rows)
        block = (N // pieces * SHARE // self.rows, 1)
        build_cuda.call(name, self, B * H * pieces, block, (T, H), (r, *others))


build_cuda.VARIANTS["wkv7"] = lambda dtype: [Variant(dtype, 64, rows) for rows in (1, 2)]


def wkv7(r, w, k, v, a, b, state, reset=None):
    """WKV-7 on a CUDA device; see `rwkv_train.wkv.wkv7`.

    w, a, b and state are float32, r, k and v all float32, bfloat16 or float16; or everything is float64.
    """
    N = r.shape[-1]
    if N > LARGEST:
        raise ValueError(
            f'wkv7: heads of {N} are too large for the CUDA kernels (at most {LARGEST}); use backend "torch"'
        )
    if missing := -N % (16 if N <= 64 else 64):  # channels of zeros, which read and change nothing
        r, w, k, v, a, b = (F.pad(x, (0, missing)) for x in (r, w, k, v, a, b))
        state = F.pad(state, (0, missing, 0, missing))
    inputs = (r, w, k, v, a, b, state)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, state, _ = torch.ops.rwkv_train.wkv7(*inputs, reset, save)
    return (y[..., :N], state[..., :N, :N]) if missing else (y, state)


_SEQUENCES = "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b"
build_cuda.library.define(
    f"wkv7({_SEQUENCES}, Tensor state, Tensor? reset, bool save) -> (Tensor y, Tensor end, Tensor removed)"
)
build_cuda.library.define(
    f"wkv7_backward({_SEQUENCES}, Tensor state, Tensor? reset, Tensor end, Tensor removed, Tensor? gy, Tensor? gend)"
    " -> (Tensor gr, Tensor gw, Tensor gk, Tensor gv, Tensor ga, Tensor gb, Tensor gstate)"
)


def _results(r, w, k, v, a, b, state, reset, save):
    """Room for y [B, T, H, N], the state after the last token, and with `save` what is removed, as w."""
    return r.new_empty(r.shape), state.new_empty(state.shape), w.new_empty(w.shape if save else 0)


def _ready(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, and beginning where the kernels can read 16 bytes at once, as all that torch allocates does."""
    tensors = build_cuda.contiguous(*tensors)
    return [x if x is None or x.data_ptr() % 16 == 0 else x.clone() for x in tensors]


@torch.library.impl(build_cuda.library, "wkv7", "CUDA")
def _forward(r, w, k, v, a, b, state, reset, save):
    r, w, k, v, a, b, state, reset = _ready(r, w, k, v, a, b, state, reset)
    y, end, removed = _results(r, w, k, v, a, b, state, reset, save)
    Variant.of(r).run("forward", r, w, k, v, a, b, reset, state, y, end, removed if save else None)
    return y, end, removed


@torch.library.impl(build_cuda.library, "wkv7_backward", "CUDA")
def _backward(r, w, k, v, a, b, state, reset, end, removed, gy, gend):
    """gy and gend are None for zeros."""
    r, w, k, v, a, b, state, reset = _ready(r, w, k, v, a, b, state, reset)
    end, removed, gy, gend = _ready(end, removed, gy, gend)
    gr, gw, gk, gv, ga, gb, gstate = (torch.empty_like(x) for x in (r, w, k, v, a, b, state))
    gremoved, between, run = torch.empty_like(w), torch.empty_like(w), Variant.of(r).run
    (B, T, H, N) = r.shape
    anchors = state.new_empty(B, H, T // ANCHOR, N, N)
    run("gradients", r, w, k, a, b, reset, gy, gend, gv, gremoved, gstate)
    run("reads", r, w, k, v, a, b, reset, state, removed, gy, gremoved, gr, ga, between, anchors)
    run("writes", r, w, k, v, a, b, reset, removed, gy, gremoved, between, anchors, end, gend, gk, gb, gw)
    return gr, gw, gk, gv, ga, gb, gstate


torch.library.register_fake("rwkv_train::wkv7", _results, lib=build_cuda.library)


@torch.library.register_fake("rwkv_train::wkv7_backward", lib=build_cuda.library)
def _gradients(r, w, k, v, a, b, state, reset, end, removed, gy, gend):
    return tuple(x.new_empty(x.shape) for x in (r, w, k, v, a, b, state))


def _save(ctx, inputs, output):
    _, end, removed = output
    ctx.save_for_backward(*inputs[:-1], end, removed)
    ctx.set_materialize_grads(False)  # zeros for what nobody has used would have to be read, too


def _differentiate(ctx, gy, gend, _):
    return *torch.ops.rwkv_train.wkv7_backward(*ctx.saved_tensors, gy, gend), None, None


torch.library.register_autograd("rwkv_train::wkv7", _differentiate, setup_context=_save, lib=build_cuda.library)
torch.library.register_autograd("rwkv_train::wkv7_backward", build_cuda.refuse("wkv7"), lib=build_cuda.library)
