"""WKV-4 on a CUDA device, by the kernels in wkv4.cu that build_cuda.py builds."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.ops.build_cuda import NATIVE, TYPES, VARIANTS, call, contiguous, library, refuse

SOURCE = NATIVE / "wkv4.cu"
WIDTH, ROWS = 32, 8  # as in wkv4_gpu.h; WIDTH * ROWS threads are a block of the chunked kernels, WIDTH of the serial

# These are for a later look at the clock; none of them changes what is computed, but for rounding.
VECTOR = {False: 2, True: 1}  # 16-bit channels of a thread, forward and backward: as many as its registers bear
FULL = 8192  # lanes x channels that keep a GPU busy without cutting the tokens into stretches
STRETCHED = 1 << 16  # lanes x channels x stretches to aim at below that
SERIAL = 1 << 17  # lanes x channels that keep it busy with one thread each
SHORT = 32  # tokens that are not worth sharing among warps


class Variant(NamedTuple):
    """What a cubin is built for: one pass, how k, v and y are stored, and channels of a thread."""

    backward: bool
    dtype: torch.dtype
    vector: int

    @property
    def source(self) -> Path:
        return SOURCE

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("scan", "summarise_adjoints", "backward") if self.backward else ("scan", "summarise", "forward")

    @property
    def macros(self) -> list:
        which = "WKV_BACKWARD" if self.backward else "WKV_FORWARD"
        return [("WKV_X", TYPES[self.dtype]), ("WKV_V", str(self.vector)), which]


VARIANTS["wkv4"] = lambda dtype: [Variant(b, dtype, VECTOR[b] if dtype.itemsize == 2 else 1) for b in (False, True)]


def wkv4(w, u, k, v, state, reset=None, path="auto"):
    """WKV-4 on a CUDA device; see `rwkv_train.wkv.wkv4`.

    w, u and state are float32, k and v float32, bfloat16 or float16; or all are float64. `path` is "serial" (a thread
    a channel walks the tokens), "chunked" (many threads a channel) or "auto", which picks by size.
    """
    if path not in ("auto", "serial", "chunked"):
        raise ValueError(f'wkv4: unknown path {path!r}, expected "auto", "serial" or "chunked"')
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (w, u, k, v, state))
    y, end, _ = torch.ops.rwkv_train.wkv4(w, u, k, v, state, reset, path, save)
    return y, end


def _row(dtype: torch.dtype) -> int:
    """Tokens of a row, S in wkv4_gpu.h; the states before rows are kept for the backward."""
    return 4 if dtype == torch.float64 else 16


class _Work(NamedTuple):
    """How a call is cut up: rows a block, L tokens a stretch; a stretch and an `S` as in wkv4.cu."""

    B: int
    T: int
    C: int
    S: int
    rows: int
    L: int

    @property
    def stretches(self) -> int:
        return -(-self.T // self.L)

    @classmethod
    def plan(cls, k: Tensor, path: str) -> "_Work":
        B, T, C = k.shape
        S = _row(k.dtype)
        if path == "auto":
            path = "serial" if T <= SHORT or B * C >= SERIAL else "chunked"
        if path == "serial":
            return cls(B, T, C, S, 1, T)
        tile = ROWS * S
        stretches = 1 if B * C >= FULL else -(-STRETCHED // max(1, B * C))
        return cls(B, T, C, S, ROWS, -(-T // (stretches * tile)) * tile)

    def run(self, name: str, variant: Variant, rows: int, *arguments: Tensor | None) -> None:
        """One of the kernels that have a block for each stretch and 32 threads' channels."""
        blocks = self.B * self.stretches * -(-self.C // (WIDTH * variant.vector))
        call(name, variant, blocks, (WIDTH, rows), (self.T, self.C, self.L), arguments)

    def hand_on(self, variant: Variant, state: Tensor, gend: Tensor | None, crossings: Tensor) -> Tensor:
        """What the scan hands to each stretch, [B, stretches, 4, C]."""
        handed = state.new_empty(self.B, self.stretches, 4, self.C)
        sizes = (self.B, self.C, self.stretches, int(variant.backward))
        blocks = -(-self.B * self.C // WIDTH)
        call("scan", variant, blocks, (WIDTH, 1), sizes, (state, gend, crossings, handed))
        return handed


def _variant(backward: bool, *streams: Tensor) -> Variant:
    """With several channels a thread only if all of them start at the right places in memory."""
    vector = VECTOR[backward]
    size = vector * streams[0].element_size()
    if streams[0].element_size() > 2 or streams[0].shape[2] % vector or any(x.data_ptr() % size for x in streams):
        vector = 1
    return Variant(backward, streams[0].dtype, vector)


library.define(
    "wkv4(Tensor w, Tensor u, Tensor k, Tensor v, Tensor state, Tensor? reset, str path, bool save)"
    " -> (Tensor y, Tensor end, Tensor states)"
)
library.define(
    "wkv4_backward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? reset, Tensor states, Tensor end, Tensor? gy,"
    " Tensor? gend, str path) -> (Tensor gwu, Tensor gk, Tensor gv, Tensor gstate)"
)


def _results(w, u, k, v, state, reset, path, save):
    """Room for y [B, T, C], the state after the last token, and with `save` the states before all rows."""
    B, T, C = k.shape
    rows = -(-T // _row(k.dtype))
    return k.new_empty(B, T, C), state.new_empty(B, 3, C), state.new_empty((B, rows, 3, C) if save else 0)


@torch.library.impl(library, "wkv4", "CUDA")
def _forward(w, u, k, v, state, reset, path, save):
    w, u, k, v, state, reset = contiguous(w, u, k, v, state, reset)
    work, variant, handed = _Work.plan(k, path), _variant(False, k, v), None
    y, end, states = _results(w, u, k, v, state, reset, path, save)
    if work.stretches > 1:
        crossings = state.new_empty(work.B, work.stretches, 5, work.C)
        work.run("summarise", variant, 1, w, k, v, reset, crossings)
        handed = work.hand_on(variant, state, None, crossings)
    work.run("forward", variant, work.rows, w, u, k, v, reset, state, handed, y, end, states if save else None)
    return y, end, states


@torch.library.impl(library, "wkv4_backward", "CUDA")
def _backward(w, u, k, v, reset, states, end, gy, gend, path):
    """gy and gend are None for zeros; those of y are made here, because hardly anybody trains a state alone."""
    w, u, k, v, reset, gend = contiguous(w, u, k, v, reset, gend)
    gy = torch.zeros_like(k) if gy is None else gy.contiguous()
    work, variant, handed = _Work.plan(k, path), _variant(True, k, v, gy), None
    gk, gv, initial = torch.empty_like(k), torch.empty_like(v), torch.empty_like(end)
    sums = w.new_empty(work.B * work.stretches, 2, work.C)
    if work.stretches > 1:
        crossings = w.new_empty(work.B, work.stretches, 5, work.C)
        work.run("summarise_adjoints", variant, 1, w, u, k, v, reset, states, gy, crossings)
        handed = work.hand_on(variant, end, gend, crossings)
    inputs = (w, u, k, v, reset, states, end, gy, gend, handed)
    work.run("backward", variant, work.rows, *inputs, gk, gv, sums, initial)
    return sums.sum(0), gk, gv, initial


torch.library.register_fake("rwkv_train::wkv4", _results, lib=library)


@torch.library.register_fake("rwkv_train::wkv4_backward", lib=library)
def _gradients(w, u, k, v, reset, states, end, gy, gend, path):
    return w.new_empty(2, *w.shape), k.new_empty(k.shape), v.new_empty(v.shape), end.new_empty(end.shape)


def _save(ctx, inputs, output):
    w, u, k, v, _, reset, ctx.path, _ = inputs
    _, end, states = output
    ctx.save_for_backward(w, u, k, v, reset, states, end)
    ctx.set_materialize_grads(False)  # `states` is no small thing to make zeros of


def _differentiate(ctx, gy, gend, _):
    gwu, gk, gv, initial = torch.ops.rwkv_train.wkv4_backward(*ctx.saved_tensors, gy, gend, ctx.path)
    return *gwu, gk, gv, initial, None, None, None


torch.library.register_autograd("rwkv_train::wkv4", _differentiate, setup_context=_save, lib=library)
torch.library.register_autograd("rwkv_train::wkv4_backward", refuse("wkv4"), lib=library)
