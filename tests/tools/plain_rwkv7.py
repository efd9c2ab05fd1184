"""An RWKV-7 as its paper has it (arXiv:2503.14456): one lane, one token after the other, gradients by autograd.

Nothing here is ours but the parameters' names.
"""

import math

import torch
from torch.nn import functional as F


def zero_state(p: dict):
    """For each layer the last inputs of both mixes and the state of each head."""
    like = p["emb.weight"]
    heads, size = p["blocks.0.att.r_k"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    zeros = like.new_zeros
    return [(zeros(heads * size), zeros(heads, size, size), zeros(heads * size)) for _ in range(layers)]


def read(p: dict, token, state):
    """(logits [V], state) after one token. p: parameters by name."""
    c = p["emb.weight"].shape[1]
    x = norm(p, "blocks.0.ln0", p["emb.weight"][token])
    after, v_first = [], None
    for i, (last_att, s, last_ffn) in enumerate(state):
        here = norm(p, f"blocks.{i}.ln1", x)
        out, s, v_first = time_mix({k: p[f"blocks.{i}.att.{k}"] for k in names(p, i)}, here, last_att, s, v_first)
        x = x + out
        there = norm(p, f"blocks.{i}.ln2", x)
        mixed = there + (last_ffn - there) * p[f"blocks.{i}.ffn.x_k"].reshape(c)
        k = p[f"blocks.{i}.ffn.key.weight"] @ mixed
        x = x + p[f"blocks.{i}.ffn.value.weight"] @ torch.relu(k) ** 2
        after.append((here, s, there))
    return p["head.weight"] @ norm(p, "ln_out", x), after


def names(p: dict, layer: int) -> list[str]:
    start = f"blocks.{layer}.att."
    return [name.removeprefix(start) for name in p if name.startswith(start)]


def norm(p: dict, name: str, x):
    return F.layer_norm(x, x.shape, p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def time_mix(p: dict, x, last, s, v_first):
    heads, size = p["r_k"].shape
    c = heads * size
    xr, xw, xk, xv, xa, xg = (x + (last - x) * p[f"x_{m}"].reshape(c) for m in "rwkvag")
    r, k, v = p["receptance.weight"] @ xr, p["key.weight"] @ xk, p["value.weight"] @ xv
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"].reshape(c) + torch.tanh(xw @ p["w1"]) @ p["w2"]))
    a = torch.sigmoid(p["a0"].reshape(c) + xa @ p["a1"] @ p["a2"])
    g = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"].reshape(c) + xv @ p["v1"] @ p["v2"])
    kk = (k * p["k_k"].reshape(c)).view(heads, size)
    kk = kk / torch.clamp(kk.norm(dim=1, keepdim=True), min=1e-12)
    k = k * (1 + (a - 1) * p["k_a"].reshape(c))
    r, k, v, decay, a = (t.view(heads, size) for t in (r, k, v, decay, a))
    y, states = [], []
    for h in range(heads):
        unlearnt = s[h] @ torch.diag(decay[h]) - torch.outer(s[h] @ kk[h], kk[h] * a[h])
        states.append(unlearnt + torch.outer(v[h], k[h]))
        read_out = states[h] @ r[h]
        centred = read_out - read_out.mean()
        y.append(centred / torch.sqrt((centred**2).mean() + 64e-5))
    y = torch.stack(y).view(c) * p["ln_x.weight"] + p["ln_x.bias"]
    y = y + ((r * k * p["r_k"]).sum(1, keepdim=True) * v).view(c)
    return p["output.weight"] @ (y * g), torch.stack(states), v_first
