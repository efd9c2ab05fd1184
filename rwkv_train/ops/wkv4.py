"""The WKV-4 operator: its contract, and the choice of a backend."""

import torch
from torch import Tensor

from rwkv_train.ops import build_cuda, reference, wkv4_cpu, wkv4_cuda, wkv4_torch
from rwkv_train.ops.arguments import cast, check
from rwkv_train.ops.backends import pick

BACKENDS = {"reference": reference.wkv4, "cpu": wkv4_cpu.wkv4, "torch": wkv4_torch.wkv4, "cuda": wkv4_cuda.wkv4}
HALVES = {
    wkv4_cpu.wkv4: (torch.bfloat16,),
    wkv4_cuda.wkv4: (torch.bfloat16, torch.float16),
}  # read and written without copies


def empty_state(batch: int, channels: int, *, dtype=torch.float32, device=None) -> Tensor:
    """The WKV-4 state [B, 3, C] before any token: numerator 0, denominator 0, max exponent -1e38."""
    state = torch.zeros(batch, 3, channels, dtype=dtype, device=device)
    state[:, 2] = reference.EMPTY
    return state


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The WKV-4 operator: a decaying, exponentially weighted mean of v over the past, channel by channel.

        y_t = (sum_{i<t} exp((t-1-i) w + k_i) v_i + exp(u + k_t) v_t)
            / (sum_{i<t} exp((t-1-i) w + k_i)     + exp(u + k_t))

    Arguments (B lanes, T >= 1 tokens, C channels; float16, bfloat16, float32 or float64, also mixed):
        w      [C]        log decay per token, < 0: -exp(time_decay)
        u      [C]        bonus of the current token (time_first), a log weight
        k, v   [B, T, C]  log weights and values
        state  [B, 3, C]  the past: a, b, e for the sums a * exp(e) above and b * exp(e) below the fraction.
                          Empty is (0, 0, -1e38), see `empty_state`; -1e30 does as well.
        reset  [B, T]     bool or None; True empties the state before that token, which opens a document
        backend           "auto": the kernel for the device if it can be built, otherwise "torch"
                          "reference": the plain loop; "cpu": the C++ kernel; "cuda": the CUDA kernels;
                          "torch": vectorised torch, any device

    Returns:
        y      [B, T, C]  in the dtype of k
        state  [B, 3, C]  after the last token, in the dtype of the arithmetic: float64 if any argument is
                          float64, otherwise float32, whatever autocast says

    Gradients flow to w, u, k, v and state from both results; once, not twice.

    Raises ValueError for a wrong argument, RuntimeError when backend="cpu" or "cuda" cannot be built.

    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (arXiv:2305.13048), equation 16 and
    appendix D (the shifted exponent).
    """
    dtype = _check(w, u, k, v, state, reset)
    halves = k.dtype == v.dtype and k.dtype in build_cuda.TYPES and dtype == torch.float32
    run = pick("wkv4", BACKENDS, backend, k.device, k.dtype if halves else dtype)
    stored = k.dtype if halves and k.dtype in HALVES.get(run, ()) else dtype
    w, u, state = (cast(x, dtype) for x in (w, u, state))
    y, state = run(w, u, cast(k, stored), cast(v, stored), state, reset)
    return cast(y, k.dtype), state


def _check(w, u, k, v, state, reset) -> torch.dtype:
    """Refuse what is no argument of wkv4; return the dtype to compute in."""
    if k.dim() != 3 or k.shape[1] < 1:
        raise ValueError(f"wkv4: k has shape {list(k.shape)}, expected [B, T, C] with T >= 1")
    B, T, C = k.shape
    arguments = {
        "w": (w, "[C]", (C,)),
        "u": (u, "[C]", (C,)),
        "k": (k, "[B, T, C]", (B, T, C)),
        "v": (v, "[B, T, C]", (B, T, C)),
        "state": (state, "[B, 3, C]", (B, 3, C)),
    }
    return check("wkv4", "k", arguments, reset)
