"""RWKV-4. Parameter names and shapes are those of BlinkDL's `.pth` files, so they load without a renaming table."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkv_train.models.base import RWKV, Linear, orthogonal_
from rwkv_train.models.state import State
from rwkv_train.ops.elementwise import gate, squared_relu, token_shift_mix
from rwkv_train.ops.wkv4 import wkv4


@dataclass(frozen=True)
class RWKV4Config:
    """Sizes of an RWKV-4; all of them can be read off a checkpoint's shapes.

    n_att and n_ffn of 0 mean n_embd and 4 * n_embd. dropout applies to each block's two residual branches.
    """

    vocab_size: int
    n_embd: int
    n_layer: int
    n_att: int = 0
    n_ffn: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "n_att", self.n_att or self.n_embd)
        object.__setattr__(self, "n_ffn", self.n_ffn or 4 * self.n_embd)


class TimeMix(nn.Module):
    """Attention's part: out = Wo (sigmoid(r) * wkv(k, v))."""

    def __init__(self, c: RWKV4Config):
        super().__init__()
        self.time_decay = nn.Parameter(torch.empty(c.n_att))
        self.time_first = nn.Parameter(torch.empty(c.n_att))
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, c.n_embd))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, c.n_embd))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, c.n_embd))
        self.key = Linear(c.n_embd, c.n_att)
        self.value = Linear(c.n_embd, c.n_att)
        self.receptance = Linear(c.n_embd, c.n_att)
        self.output = Linear(c.n_att, c.n_embd)

    def forward(self, x: Tensor, last: Tensor, wkv: Tensor, reset: Tensor | None, carry: None):
        xk, xv, xr, last = token_shift_mix(x, last, reset, self.time_mix_k, self.time_mix_v, self.time_mix_r)
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)
        w, u = -torch.exp(self.time_decay.to(wkv.dtype)), self.time_first.to(wkv.dtype)
        y, wkv = wkv4(w, u, k, v, wkv, reset)
        return self.output(gate(r, y)), last, wkv, carry


class ChannelMix(nn.Module):
    """The feed-forward part: out = sigmoid(r) * Wv relu(k)^2."""

    def __init__(self, c: RWKV4Config):
        super().__init__()
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, c.n_embd))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, c.n_embd))
        self.key = Linear(c.n_embd, c.n_ffn)
        self.receptance = Linear(c.n_embd, c.n_embd)
        self.value = Linear(c.n_ffn, c.n_embd)

    def forward(self, x: Tensor, last: Tensor, reset: Tensor | None):
        xk, xr, last = token_shift_mix(x, last, reset, self.time_mix_k, self.time_mix_r)
        return gate(self.receptance(xr), self.value(squared_relu(self.key(xk)))), last


class RWKV4(RWKV):
    """RWKV-4 language model; see `RWKV.forward` for the call."""

    name = "RWKV-4"
    adam_eps = 1e-8

    def __init__(self, config: RWKV4Config):
        super().__init__(config, ((TimeMix(config), ChannelMix(config)) for _ in range(config.n_layer)))

    def zero_wkv(self, batch: int, **like) -> Tensor:
        wkv = torch.zeros(batch, self.config.n_layer, 3, self.config.n_att, **like)
        wkv[:, :, 2] = -1e38
        return wkv

    def trainable_state(self) -> State:
        """Exactly the empty state: numerator and denominator are 0, whatever the exponent."""
        shift, wkv = self.zero_state(1)
        wkv[:, :, 2] = 0
        return State(shift, wkv)

    @torch.no_grad()
    def repair_initial_state(self) -> None:
        self.initial_wkv[:, :, 1].clamp_(min=0)  # a denominator

    @torch.no_grad()
    def init_weights(self) -> "RWKV4":
        """Fresh weights for training from scratch (design note models.md, after RWKV-LM's v4 trainer)."""
        c = self.config
        self.emb.weight.uniform_(-1e-4, 1e-4)
        orthogonal_(self.head.weight, 0.5)
        for i, block in enumerate(self.blocks):
            depth = i / (c.n_layer - 1) if c.n_layer > 1 else 0.0  # 0 at the first layer, 1 at the last
            rest = 1 - i / c.n_layer  # 1 at the first layer, towards 0
            channel = torch.arange(c.n_embd) / c.n_embd
            att, ffn = block.att, block.ffn
            position = torch.arange(c.n_att) / max(c.n_att - 1, 1)
            att.time_decay.copy_(-5 + 8 * position ** (0.7 + 1.3 * depth))
            att.time_first.copy_(math.log(0.3) + 0.5 * ((torch.arange(c.n_att) + 1) % 3 - 1))
            att.time_mix_k.copy_(channel**rest)
            att.time_mix_v.copy_(channel**rest + 0.3 * depth)
            att.time_mix_r.copy_(channel ** (0.5 * rest))
            ffn.time_mix_k.copy_(channel**rest)
            ffn.time_mix_r.copy_(channel**rest)
            for zero in (att.key, att.receptance, att.output, ffn.value, ffn.receptance):
                zero.weight.zero_()
            orthogonal_(att.value.weight)
            orthogonal_(ffn.key.weight)
        return self
