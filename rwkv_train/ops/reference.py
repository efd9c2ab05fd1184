"""The specification: WKV as the plain recurrence in torch, any floating dtype, differentiated by autograd.

Every faster backend has the signature of a function here and is tested against it.
"""

import torch

EMPTY = -1e38  # the exponent of an empty state; sums of exponents are clamped here, so they never reach -inf


def wkv4_out(u, k, v, a, b, e):
    """What a token reads from the state (a, b, e) before it: y; all arguments broadcast to [..., C].

    Returns y, and m = max(e, u + k) and den such that exp(m) * den is the denominator of y.
    """
    now = u + k
    m = torch.maximum(e, now)
    old, new = torch.exp(e - m), torch.exp(now - m)
    den = old * b + new
    return (old * a + new * v) / den, m, den


def wkv4_step(w, k, v, a, b, e):
    """The state after a token: a * exp(e) and b * exp(e) decay by exp(w), then gain exp(k) * v and exp(k)."""
    decayed = (w + e).clamp(min=EMPTY)
    e = torch.maximum(decayed, k)
    old, new = torch.exp(decayed - e), torch.exp(k - e)
    return old * a + new * v, old * b + new, e


def wkv4(w, u, k, v, state, reset=None):
    """WKV-4, token by token; arguments and results as in `rwkv_train.wkv.wkv4`, all of one dtype."""
    a, b, e = state.unbind(1)
    resets = reset.unbind(1) if reset is not None else [None] * k.shape[1]
    ys = []
    # unbind, not k[:, t]: the backward of indexing fills a whole [B, T, C] for every token
    for kt, vt, rt in zip(k.unbind(1), v.unbind(1), resets, strict=True):
        if rt is not None:
            rt = rt[:, None]
            a, b, e = a.masked_fill(rt, 0), b.masked_fill(rt, 0), e.masked_fill(rt, EMPTY)
        ys.append(wkv4_out(u, kt, vt, a, b, e)[0])
        a, b, e = wkv4_step(w, kt, vt, a, b, e)
    return torch.stack(ys, 1), torch.stack((a, b, e), 1)


def wkv7(r, w, k, v, a, b, state, reset=None):
    """WKV-7, token by token; arguments and results as in `rwkv_train.wkv.wkv7`, all of one dtype."""
    resets = reset.unbind(1) if reset is not None else [None] * r.shape[1]
    decay, ys = torch.exp(w), []
    for rt, dt, kt, vt, at, bt, begins in zip(*(x.unbind(1) for x in (r, decay, k, v, a, b)), resets, strict=True):
        if begins is not None:
            state = state.masked_fill(begins[:, None, None, None], 0)
        removed = state @ at[..., None] * bt[..., None, :]  # outer products: [B,H,N,1] * [B,H,1,N]
        state = state * dt[..., None, :] + removed + vt[..., None] * kt[..., None, :]
        ys.append((state @ rt[..., None]).squeeze(-1))
    return torch.stack(ys, 1), state
