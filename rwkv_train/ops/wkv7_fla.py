"""WKV-7 by the Triton kernels of fla-core (`rwkv_train[fla]`), which know documents as sequences of a packed batch."""

import importlib
from importlib.util import find_spec

import torch
import torch.nn.functional as F

LOWEST = -0.6065306597126334  # RWKV-7's lowest log decay, on which their fastest way relies


def available() -> bool:
    return find_spec("fla") is not None


def wkv7(r, w, k, v, a, b, state, reset=None):
    """WKV-7 by fla-core; see `rwkv_train.wkv.wkv7`. CUDA tensors; w is at least -0.6065.

    Each lane's documents become sequences of one long row. Where they end is read from the device.
    """
    if not available():
        raise RuntimeError("wkv7: backend \"fla\" needs fla-core: pip install 'rwkv_train[fla]'")
    chunk_rwkv7 = importlib.import_module("fla.ops.rwkv7").chunk_rwkv7
    options = {"scale": 1.0, "output_final_state": True, "safe_gate": True, "lower_bound": LOWEST, "chunk_size": 64}
    sequences, (B, T) = (r, w, k, v, a.to(r.dtype), b.to(r.dtype)), r.shape[:2]  # matrix products of one dtype
    state = state.mT  # theirs is [key, value]
    if reset is None:
        y, state = chunk_rwkv7(*sequences, initial_state=state.contiguous(), **options)
        return y, state.mT
    opens = reset.clone()
    opens[:, 0] = True  # a lane begins a sequence, of a document or in the midst of one
    starts = opens.flatten().nonzero().flatten()
    carried = ((starts % T == 0) & ~reset.flatten()[starts])[:, None, None, None]
    initial = torch.where(carried, state[starts // T], 0)
    ends = F.pad(starts, (0, 1), value=B * T)
    packed = (x.flatten(0, 1)[None] for x in sequences)
    y, finals = chunk_rwkv7(*packed, initial_state=initial, cu_seqlens=ends, **options)
    return y.unflatten(1, (B, T))[0], finals[ends[1:] % T == 0].mT
