"""The WKV-7 operator: its contract, and the choice of a backend."""

import torch
from torch import Tensor

from rwkv_train.wkv import chunked7, cpu, cpu7, reference
from rwkv_train.wkv.arguments import cast, check


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The WKV-7 operator: a matrix per head that decays, is changed along one direction, and learns a pair.

        S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

    Arguments (B lanes, T >= 1 tokens, H heads, N head size; float16, bfloat16, float32 or float64, also mixed):
        r, w, k, v, a, b  [B, T, H, N]  w is the log decay, <= 0. In RWKV-7 it is at least -0.6065, a is minus a
                                        vector of length 1 and b its negative times rates in [0, 1].
        state  [B, H, N, N]             S before the first token, indexed [value, key]; zeros when there is no past
        reset  [B, T]                   bool or None; True empties the state before that token, which opens a document
        backend                         "auto": the C++ kernel on a CPU if it can be built, otherwise "torch"
                                        "reference": the plain loop; "cpu": the C++ kernel; "torch": chunks of matrix
                                        products, any device, w no lower than -5; "cuda": not part of this version

    Returns:
        y      [B, T, H, N]  in the dtype of r
        state  [B, H, N, N]  after the last token, in the dtype of the arithmetic: float64 if any argument is
                             float64, otherwise float32, whatever autocast says

    Gradients flow to all of them but reset, from both results; with backend "cpu" once, not twice.

    Raises ValueError for a wrong argument, RuntimeError when backend="cpu" and the kernel cannot be built.

    Source: Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (arXiv:2503.14456), equation 16.
    """
    if r.dim() != 4 or r.shape[1] < 1:
        raise ValueError(f"wkv7: r has shape {list(r.shape)}, expected [B, T, H, N] with T >= 1")
    (B, _, H, N), sequences = r.shape, {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    arguments = {name: (x, "[B, T, H, N]", tuple(r.shape)) for name, x in sequences.items()}
    dtype = check("wkv7", "r", arguments | {"state": (state, "[B, H, N, N]", (B, H, N, N))}, reset)
    run = _pick(backend, r.device)
    with torch.autocast(r.device.type, enabled=False):
        y, state = run(*(cast(x, dtype) for x in (r, w, k, v, a, b, state)), reset)
    return cast(y, r.dtype), state


def _pick(backend: str, device: torch.device):
    """The implementation of wkv7 behind a backend's name."""
    if backend == "auto":
        backend = "cpu" if device.type == "cpu" and cpu.available() else "torch"
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f'wkv7: backend "cpu" needs tensors on the CPU, found {device}; use "auto"')
        return cpu7.wkv7
    if backend == "torch":
        return chunked7.wkv7
    if backend == "reference":
        return reference.wkv7
    if backend == "cuda":
        raise ValueError('wkv7: the CUDA kernel is not part of this version yet; use backend "auto"')
    raise ValueError(f'wkv7: unknown backend {backend!r}, expected "auto", "reference", "cpu", "torch" or "cuda"')
