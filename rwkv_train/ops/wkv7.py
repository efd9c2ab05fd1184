"""The WKV-7 operator: its contract, and the choice of a backend."""

from contextlib import nullcontext

import torch
from torch import Tensor

from rwkv_train.ops import build_cuda, reference, wkv7_cpu, wkv7_cuda, wkv7_fla, wkv7_torch
from rwkv_train.ops.arguments import cast, check
from rwkv_train.ops.backends import pick

BACKENDS = {
    "reference": reference.wkv7,
    "cpu": wkv7_cpu.wkv7,
    "torch": wkv7_torch.wkv7,
    "cuda": wkv7_cuda.wkv7,
    "fla": wkv7_fla.wkv7,
}
HALVES = {
    wkv7_cpu.wkv7: (torch.bfloat16,),
    wkv7_cuda.wkv7: (torch.bfloat16, torch.float16),
    wkv7_fla.wkv7: (torch.bfloat16, torch.float16),
}  # read and written without copies


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
        backend                         "auto": the kernel for the device if it can be built, otherwise "torch"
                                        "reference": the plain loop; "cpu": the C++ kernel; "cuda": the CUDA kernels;
                                        "torch": chunks of matrix products, any device, w no lower than -5
                                        "fla": fla-core's, on a GPU, w no lower than -0.6065; never chosen by "auto"

    Returns:
        y      [B, T, H, N]  in the dtype of r
        state  [B, H, N, N]  after the last token, in the dtype of the arithmetic: float64 if any argument is
                             float64, otherwise float32, whatever autocast says

    Gradients flow to all of them but reset, from both results; with the kernels once, not twice.

    Raises ValueError for a wrong argument, RuntimeError when backend="cpu" or "cuda" cannot be built.

    Source: Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (arXiv:2503.14456), equation 16.
    """
    if r.dim() != 4 or r.shape[1] < 1:
        raise ValueError(f"wkv7: r has shape {list(r.shape)}, expected [B, T, H, N] with T >= 1")
    (B, _, H, N), sequences = r.shape, {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    arguments = {name: (x, "[B, T, H, N]", tuple(r.shape)) for name, x in sequences.items()}
    dtype = check("wkv7", "r", arguments | {"state": (state, "[B, H, N, N]", (B, H, N, N))}, reset)
    halves = r.dtype == k.dtype == v.dtype and r.dtype in build_cuda.TYPES and dtype == torch.float32
    run = pick("wkv7", BACKENDS, backend, r.device, r.dtype if halves else dtype)
    stored = r.dtype if halves and r.dtype in HALVES.get(run, ()) else dtype
    device = r.device.type
    # Entering that context takes as long as one token.
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        r_, k, v = (cast(x, stored) for x in (r, k, v))
        y, state = run(r_, cast(w, dtype), k, v, *(cast(x, dtype) for x in (a, b, state)), reset)
    return cast(y, r.dtype), state
