"""Changes of a matrix [out,in] by few numbers: LoRA's and PiSSA's two factors, MiSS's one small matrix.

The one place where their formulas stand: `fit` trains them beside a weight, corrections add them to one.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["lora", "pissa", "miss"]
FACTORS = ("up", "down", "miss")  # their names


def begin(kind: Kind, weight: Tensor, rank: int, rng: torch.Generator | None = None) -> dict[str, Tensor]:
    """What is trained for a weight [out,in], as it begins: up [out,r] and down [r,in], or miss [r,out].

    lora: up is 0 (Hu et al. 2021), and down drawn from rng, torch's own if None. miss: 0 (Kang and Yin 2024). pissa:
    the r largest singular vectors, each with the root of its value (Meng et al. 2024); that product is what has to be
    taken out of the weight. Raises ValueError for a rank that the weight has no room for.
    """
    outer, inner = weight.shape
    most = {"lora": rank, "pissa": min(outer, inner), "miss": inner}[kind]
    if rank > most:
        raise ValueError(
            f"rank {rank} of {kind} is more than a matrix [{outer}, {inner}] has room for, {most}; give a smaller one"
        )
    if kind == "miss":
        return {"miss": weight.new_zeros(rank, outer)}
    if kind == "lora":
        down = torch.randn(rank, inner, generator=rng) / inner**0.5
        return {"up": weight.new_zeros(outer, rank), "down": down.to(weight)}
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):  # its random start is the same each time
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight.double(), min(rank + 8, most), niter=8)
    roots = s[:rank].sqrt()
    return {"up": (u[:, :rank] * roots).to(weight), "down": (v[:, :rank] * roots).t().to(weight)}


def change(factors: Mapping[str, Tensor], width: int) -> Tensor:
    """What they add to their weight: [out,in], in = width. up down; of miss, its transpose side by side, cut at in."""
    if "miss" in factors:
        small = factors["miss"].t()
        return small.repeat(1, -(-width // small.shape[1]))[:, :width]
    return factors["up"] @ factors["down"]


def add_product(y: Tensor, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """y [N,out] += x [N,in] change^T, in place: a sum of its own would fragment the heap."""
    if "miss" in factors:
        up = factors["miss"]
        low = F.pad(x, (0, -x.shape[1] % len(up))).unflatten(1, (-1, len(up))).sum(1)
    else:
        up, low = factors["up"].t(), F.linear(x, factors["down"])
    return y.addmm_(low.to(y.dtype), up.to(y.dtype))


def as_lora(factors: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """The same change as (up [out,r], down [r,in])."""
    if "miss" not in factors:
        return factors["up"], factors["down"]
    eye = torch.eye(len(factors["miss"])).to(factors["miss"])
    return factors["miss"].t(), change({"miss": eye}, width)
