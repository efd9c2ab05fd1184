"""WKV-7 in torch for any device: chunks of matrix products, what runs where no kernel does.

Within a chunk the state is S_t = S_0 diag(exp c_t) + sum_{s<=t} (u_s b_s^T + v_s k_s^T) diag(exp(c_t - c_s)), where
c_t is the sum of the log decays up to t and u_t = S_{t-1} a_t. Writing that into the definition of u_t gives a
triangular system, the same for all chunks but for S_0; once it is solved a scan over the chunks finds each one's S_0.
Decays between two tokens are products of exp(c_t) and exp(-c_s): chunks are so short that neither leaves the range of
float32.
"""

import torch
import torch.nn.functional as F

L = 16  # tokens of a chunk: exp(16 * 5) is still a float32


def wkv7(r, w, k, v, a, b, state, reset=None):
    """WKV-7 for all arguments of one dtype; see `rwkv_train.wkv.wkv7`. Gradients by autograd."""
    T, dtype = r.shape[1], r.dtype
    r, w, k, v, a, b = (_chunks(x) for x in (r, w, k, v, a, b))
    c = w.cumsum(-2)
    total = c[..., -1:, :]
    r, a = r * c.exp(), a * (c - w).exp()  # reading the state after, and before, the token
    same, opens, lasts = _documents(reset, T, r)
    grown = torch.exp(-c)
    scores = torch.cat([a, r], -2) @ torch.cat([b * grown, k * grown], -2).mT
    scores = scores.unflatten(-1, (2, L)).unflatten(-3, (2, L)).masked_fill(~same[..., None, :, None, :], 0)
    (ab, rb), (ak, rk) = (side.unbind(-3) for side in scores.unbind(-2))
    ab, ak = ab.tril(-1), ak.tril(-1)
    # u = from_state S_0^T + own
    eye = torch.eye(L, dtype=dtype, device=r.device)
    right = torch.cat([a * opens, ak @ v], -1)
    from_state, own = torch.linalg.solve_triangular(eye - ab, right, upper=False, unitriangular=True).chunk(2, -1)
    ends_b, ends_k = ((total - c).exp() * lasts * x for x in (b, k))
    keeps = total.exp() * opens[..., -1:, :]
    learnt = v.mT @ ends_k
    S, starts, us = state, [], []
    # unbind, not x[:, :, m]: the backward of indexing fills a whole tensor for every chunk
    for from_m, own_m, keeps_m, ends_m, learnt_m in zip(
        *(x.unbind(2) for x in (from_state, own, keeps, ends_b, learnt)), strict=True
    ):
        starts.append(S)
        us.append(from_m @ S.mT + own_m)
        S = S * keeps_m + us[-1].mT @ ends_m + learnt_m
    y = (r * opens) @ torch.stack(starts, 2).mT + rb @ torch.stack(us, 2) + rk @ v
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2), S


def _chunks(x):
    """[B,T,H,N] -> [B,H,M,L,N], the last chunk filled up with zeros, which change no state."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % L))
    return x.unflatten(2, (-1, L))


def _documents(reset, T: int, like):
    """Of the tokens of each chunk:

    same [..,L,L] bool: the column's token is in the row's document, and not after it; opens [..,L,1], a factor of 0 or
    1: the document began before the chunk; lasts [..,L,1] likewise: it is the document that goes on after the chunk.
    """
    causal = torch.ones(L, L, dtype=torch.bool, device=like.device).tril()
    if reset is None:
        one = like.new_ones(1, 1)
        return causal, one, one
    number = F.pad(reset, (0, -T % L)).unflatten(1, (-1, L))[:, None].cumsum(-1)  # [B,1,M,L]
    same = (number[..., :, None] == number[..., None, :]) & causal
    return same, (number == 0)[..., None].to(like), (number == number[..., -1:])[..., None].to(like)
