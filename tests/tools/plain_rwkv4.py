"""An RWKV-4 as its paper has it (arXiv:2305.13048): one lane, one token after the other, gradients by autograd.

Nothing here is ours but the parameters' names. Sums are kept as they are, without an exponent: for small numbers alone.
"""

import torch
from torch.nn import functional as F


def zero_state(p: dict):
    """For each layer the last inputs of both mixes, and numerator and denominator."""
    zeros, c = p["emb.weight"].new_zeros, p["emb.weight"].shape[1]
    a = len(p["blocks.0.att.time_decay"])
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    return [(zeros(c), zeros(a), zeros(a), zeros(c)) for _ in range(layers)]


def read(p: dict, token, state):
    """(logits [V], state) after one token. p: parameters by name."""
    x = norm(p, "blocks.0.ln0", p["emb.weight"][token])
    after = []
    for i, (last_att, numerator, denominator, last_ffn) in enumerate(state):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        here = norm(p, f"blocks.{i}.ln1", x)
        xk, xv, xr = (mixed(here, last_att, p[f"{att}time_mix_{m}"]) for m in "kvr")
        k, v = p[f"{att}key.weight"] @ xk, p[f"{att}value.weight"] @ xv
        r = torch.sigmoid(p[f"{att}receptance.weight"] @ xr)
        bonus, decay = torch.exp(p[f"{att}time_first"] + k), torch.exp(-torch.exp(p[f"{att}time_decay"]))
        wkv = (numerator + bonus * v) / (denominator + bonus)
        x = x + p[f"{att}output.weight"] @ (r * wkv)
        there = norm(p, f"blocks.{i}.ln2", x)
        yk, yr = (mixed(there, last_ffn, p[f"{ffn}time_mix_{m}"]) for m in "kr")
        out = p[f"{ffn}value.weight"] @ torch.relu(p[f"{ffn}key.weight"] @ yk) ** 2
        x = x + torch.sigmoid(p[f"{ffn}receptance.weight"] @ yr) * out
        after.append((here, decay * numerator + torch.exp(k) * v, decay * denominator + torch.exp(k), there))
    return p["head.weight"] @ norm(p, "ln_out", x), after


def norm(p: dict, name: str, x):
    return F.layer_norm(x, x.shape, p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def mixed(x, last, share):
    share = share.reshape(x.shape)
    return x * share + last * (1 - share)
