"""WKV in vectorised torch, for any device: what runs where no kernel does.

The sequence is cut into N chunks of L tokens, both about sqrt(T). What a chunk adds to the state has a closed
form, so a short scan over the chunks finds the state at the start of each; then all chunks advance together,
token i of every chunk in one operation on [B, N, C]. The backward does the same from right to left.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rwkv_train.ops.reference import EMPTY, wkv4_out, wkv4_step


def wkv4(w, u, k, v, state, reset=None):
    """WKV-4 for all arguments of one dtype; see `rwkv_train.wkv.wkv4`."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (w, u, k, v, state)):
        return _WKV4.apply(w, u, k, v, state, reset)
    y, state, *_ = _forward(w, u, k, v, state, reset, save=False)
    return y, state


def _chunk_length(T: int) -> int:
    """A power of two near sqrt(T), so that usual lengths split without a remainder."""
    return 1 << (T - 1).bit_length() // 2


def _chunks(x, L: int, fill: float = 0):
    """[B, T, ...] -> [B, N, L, ...], the last chunk filled up."""
    missing = -x.shape[1] % L
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=fill)
    return x.unflatten(1, (x.shape[1] // L, L))


def _weighted_sums(exponent, first, second):
    """Sums of exp(exponent - top) * first and * second over the tokens of every chunk, and top, the largest.

    [B, N, L, C] -> three [B, N, C]. Where every exponent is EMPTY the sums mean nothing: exp(top) is 0.
    """
    top = exponent.amax(2)
    weight = torch.exp(exponent - top.unsqueeze(2))
    return (weight * first).sum(2), (weight * second).sum(2), top


def _scan(start, summaries, decay, closed):
    """What stands before the first, second, ... summary and after the last, given `start`, three [B, C].

    A value is (x, y, exponent). Before summary n is added it is multiplied by exp(decay[n]), decay [N, C], or
    forgotten where closed[:, n]. `summaries` are three [B, N, C], `closed` is [B, N] or None; returns three
    [B, N + 1, C].
    """
    x, y, top = start
    values = [start]
    for n in range(len(decay)):
        xn, yn, topn = (part[:, n] for part in summaries)
        moved = (top + decay[n]).clamp(min=EMPTY)
        if closed is not None:
            moved = moved.masked_fill(closed[:, n, None], EMPTY)
        top = torch.maximum(moved, topn)
        old, new = torch.exp(moved - top), torch.exp(topn - top)
        x, y = old * x + new * xn, old * y + new * yn
        values.append((x, y, top))
    return [torch.stack(parts, 1) for parts in zip(*values, strict=True)]


def _chunk_states(w, k, v, state, reset, L: int):
    """The state (a, b, e) at the start of every chunk, three [B, N, C]."""
    full = (k.shape[1] - 1) // L  # the last chunk, full or not, hands on to none
    k, v = _chunks(k[:, : full * L], L), _chunks(v[:, : full * L], L)
    exponent = k + torch.arange(L - 1, -1, -1, device=k.device)[:, None] * w  # decays until the chunk's end
    closed = None
    if reset is not None:
        reset = _chunks(reset[:, : full * L], L)
        closed = reset.any(2)
        later = reset.flip(2).cumsum(2).flip(2) - reset.long()  # resets after a token; one at it spares it
        exponent = exponent.masked_fill((later > 0).unsqueeze(3), EMPTY)
    sums = _weighted_sums(exponent, v, torch.ones_like(v))
    return _scan(state.unbind(1), sums, (L * w).expand(full, -1), closed)


def _chunk_adjoints(w, y, lse, gy, reset, end, L: int):
    """The adjoint (ga, gb, f) at the end of every chunk, three [B, N, C]; `end` is that of the last chunk."""
    T = y.shape[1]
    # The first chunk hands on to none. Token i of a chunk reaches its left end after i decays.
    exponent = _chunks(-lse[:, L:], L, EMPTY) + torch.arange(L, device=y.device)[:, None] * w
    closed = None
    if reset is not None:
        reset = _chunks(reset[:, L:], L)
        closed = reset.any(2).flip(1)
        exponent = exponent.masked_fill((reset.cumsum(2) > 0).unsqueeze(3), EMPTY)
    sums = _weighted_sums(exponent, _chunks(gy[:, L:], L), _chunks(-gy[:, L:] * y[:, L:], L))
    tokens = w.new_full((len(range(L, T, L)), 1), L)
    tokens[:1] = (T - 1) % L + 1  # the last chunk comes first
    decay = tokens * w
    return [x.flip(1) for x in _scan(end, [x.flip(1) for x in sums], decay, closed)]


def _forward(w, u, k, v, state, reset, save: bool):
    """y [B, T, C], the state after, lse [B, T, C], last [B, C], and the state at the start of every chunk.

    lse is the logarithm of the denominator of y, last the token that last renewed the exponent, -1 if none
    did; both are None without `save`.
    """
    L = _chunk_length(k.shape[1])
    starts = _chunk_states(w, k, v, state, reset, L)
    a, b, e = (x.clone() for x in starts) if save else starts
    y = torch.empty_like(k)
    lse = torch.empty_like(k) if save else None
    last = torch.full_like(e, -1, dtype=torch.long) if save else None
    first = torch.arange(e.shape[1], device=k.device)[:, None] * L
    for i in range(L):
        ki, vi = k[:, i::L], v[:, i::L]
        n = ki.shape[1]  # the last chunk ends before the others do
        s = a[:, :n], b[:, :n], e[:, :n]
        if reset is not None:
            r = reset[:, i::L, None]
            s = s[0].masked_fill(r, 0), s[1].masked_fill(r, 0), s[2].masked_fill(r, EMPTY)
        y[:, i::L], m, den = wkv4_out(u, ki, vi, *s)
        if save:
            lse[:, i::L] = m + den.log()
            last[:, :n] = torch.where(ki >= w + s[2], first[:n] + i, last[:, :n])
        a[:, :n], b[:, :n], e[:, :n] = wkv4_step(w, ki, vi, *s)
    state = torch.stack((a[:, -1], b[:, -1], e[:, -1]), 1)
    return y, state, lse, last.amax(1) if save else None, starts


class _WKV4(torch.autograd.Function):
    """The gradient from y and lse alone; formulas and their derivation as in wkv4.h, wkv4_back."""

    @staticmethod
    def forward(ctx, w, u, k, v, state, reset):
        y, out, lse, last, starts = _forward(w, u, k, v, state, reset, save=True)
        ctx.save_for_backward(w, u, k, v, reset, y, out, lse, last, *starts)
        return y, out

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gstate):
        w, u, k, v, reset, y, out, lse, last, a, b, e = ctx.saved_tensors
        gw, gu, gk, gv, (ga, gb, f, pa, pb) = _sweep(w, u, k, v, reset, y, lse, gy, out, gstate)
        # Each chunk counted the decays since its own end; those times what it was handed are the rest.
        scale = torch.exp((f + e).clamp(min=EMPTY))
        gw += scale * (pa * a + pb * b)
        ga, gb = (scale * ga)[:, 0], (scale * gb)[:, 0]
        # The exponent's own gradient, beyond its rescaling of a and b, goes to the token that renewed it.
        rest = gstate[:, 2] - (out[:, :2] * gstate[:, :2]).sum(1)
        renewed = last >= 0
        gk.scatter_add_(1, last.clamp(min=0)[:, None], (rest * renewed)[:, None])
        ge = a[:, 0] * ga + b[:, 0] * gb + rest * ~renewed
        gw = gw.sum((0, 1)) + (rest * (k.shape[1] - 1 - last)).sum(0)
        return gw, gu, gk, gv, torch.stack((ga, gb, ge), 1), None


def _sweep(w, u, k, v, reset, y, lse, gy, out, gstate):
    """All chunks from right to left: gw [B, N, C] without what crosses chunks, gu [C], gk, gv, the adjoints.

    The adjoints at the left end of every chunk are (ga, gb, f, pa, pb), five [B, N, C], as in wkv4.h.
    """
    L = _chunk_length(k.shape[1])
    ga, gb, f = _chunk_adjoints(w, y, lse, gy, reset, (gstate[:, 0], gstate[:, 1], -out[:, 2]), L)
    pa, pb, gw, gu = (torch.zeros_like(ga) for _ in range(4))
    gk, gv = torch.empty_like(k), torch.empty_like(v)
    for i in reversed(range(L)):
        ki, vi, yi, li, gyi = (x[:, i::L] for x in (k, v, y, lse, gy))
        n = ki.shape[1]  # the last chunk ends before the others do
        G, H, E, P, Q = (x[:, :n] for x in (ga, gb, f, pa, pb))
        own, kept = gyi * torch.exp(u + ki - li), torch.exp(ki + E)
        bonus = own * (vi - yi)
        gk[:, i::L] = bonus + kept * (G * vi + H)
        gv[:, i::L] = own + kept * G
        gu[:, :n] += bonus
        gw[:, :n] += kept * (P * vi + Q)
        decayed = (w + E).clamp(min=EMPTY)
        top = torch.maximum(decayed, -li)
        old, new = torch.exp(decayed - top), torch.exp(-li - top) * gyi
        before = [old * G + new, old * H - new * yi, top, old * (P + G), old * (Q + H)]
        if reset is not None:
            r = reset[:, i::L, None]
            before = [x.masked_fill(r, fill) for x, fill in zip(before, (0, 0, EMPTY, 0, 0), strict=True)]
        ga[:, :n], gb[:, :n], f[:, :n], pa[:, :n], pb[:, :n] = before
    return gw, gu.sum((0, 1)), gk, gv, (ga, gb, f, pa, pb)
