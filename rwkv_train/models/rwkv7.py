"""RWKV-7. Parameter names and shapes are those of BlinkDL's `.pth` files, so they load without a renaming table.

Source: Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution" (arXiv:2503.14456).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkv_train.models.base import RWKV, Linear, orthogonal_
from rwkv_train.ops.elementwise import squared_relu, token_shift_mix
from rwkv_train.ops.elementwise7 import HEAD_NORM_EPS, decay, head_output, keys, value_residual
from rwkv_train.ops.linear import times
from rwkv_train.ops.wkv7 import wkv7

RANK_FACTORS = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}  # ranks of fresh models are these times sqrt(n_embd)


@dataclass(frozen=True)
class RWKV7Config:
    """Sizes of an RWKV-7; all of them can be read off a checkpoint's shapes.

    n_ffn of 0 means 4 * n_embd. rank_w, rank_a, rank_v and rank_g are those of the low-rank maps behind decay,
    in-context learning rate, value residual and gate; 0 means the recipe's. first_v: the first layer has the value
    residual's weights too, as some files do. dropout applies to each block's two residual branches.
    """

    vocab_size: int
    n_embd: int
    n_layer: int
    head_size: int = 64
    n_ffn: int = 0
    rank_w: int = 0
    rank_a: int = 0
    rank_v: int = 0
    rank_g: int = 0
    first_v: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if self.n_embd % self.head_size:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of head_size ({self.head_size})")
        object.__setattr__(self, "n_ffn", self.n_ffn or 4 * self.n_embd)
        for letter, factor in RANK_FACTORS.items():
            rank = max(32, 32 * round(factor * self.n_embd**0.5 / 32))
            object.__setattr__(self, f"rank_{letter}", getattr(self, f"rank_{letter}") or rank)

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size


class TimeMix(nn.Module):
    """Attention's part: the state unlearns what it holds under a key, learns the new value, and is read by r.

    The last argument and result is v_first, the first layer's values [B,T,C]: None goes in at the first layer.
    """

    def __init__(self, c: RWKV7Config, first: bool):
        super().__init__()
        self.n_head = c.n_head
        vector = lambda: nn.Parameter(torch.empty(1, 1, c.n_embd))  # noqa: E731
        matrix = lambda rows, columns: nn.Parameter(torch.empty(rows, columns))  # noqa: E731
        # How much of this token, and how much of the last one, each of the six reads.
        self.x_r = vector()  # receptance
        self.x_w = vector()  # decay
        self.x_k = vector()  # key
        self.x_v = vector()  # value
        self.x_a = vector()  # in-context learning rate
        self.x_g = vector()  # gate
        # Decay: w0 + tanh(x w1) w2.
        self.w1 = matrix(c.n_embd, c.rank_w)
        self.w2 = matrix(c.rank_w, c.n_embd)
        self.w0 = vector()
        # In-context learning rate: sigmoid(a0 + x a1 a2).
        self.a1 = matrix(c.n_embd, c.rank_a)
        self.a2 = matrix(c.rank_a, c.n_embd)
        self.a0 = vector()
        # Value residual, how much of the first layer's value is taken: sigmoid(v0 + x v1 v2).
        if not first:
            self.v1 = matrix(c.n_embd, c.rank_v)
            self.v2 = matrix(c.rank_v, c.n_embd)
            self.v0 = vector()
        elif c.first_v:  # buffers: kept for other programs, of no effect
            self.register_buffer("v1", torch.empty(c.n_embd, c.rank_v))
            self.register_buffer("v2", torch.empty(c.rank_v, c.n_embd))
            self.register_buffer("v0", torch.empty(1, 1, c.n_embd))
        # Gate: sigmoid(x g1) g2.
        self.g1 = matrix(c.n_embd, c.rank_g)
        self.g2 = matrix(c.rank_g, c.n_embd)
        self.first = first
        self.k_k = vector()  # the key under which the state unlearns, as a share of the key
        self.k_a = vector()  # how far the learning rate scales the key under which it learns
        self.r_k = matrix(c.n_head, c.head_size)  # bonus of the current token
        self.receptance = Linear(c.n_embd, c.n_embd)
        self.key = Linear(c.n_embd, c.n_embd)
        self.value = Linear(c.n_embd, c.n_embd)
        self.output = Linear(c.n_embd, c.n_embd)
        self.ln_x = nn.GroupNorm(c.n_head, c.n_embd, eps=HEAD_NORM_EPS)

    def forward(self, x: Tensor, last: Tensor, wkv: Tensor, reset: Tensor | None, v_first: Tensor | None):
        mixes = 1 - torch.cat((self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g), 1)
        xr, xw, xk, xv, xa, xg, last = token_shift_mix(x, last, reset, *mixes.unbind(1))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        down = [(xw, self.w1), (xa, self.a1), (xg, self.g1)] + ([] if self.first else [(xv, self.v1)])
        low_w, low_a, low_g, *low_v = times(*down)
        up = [(torch.tanh(low_w), self.w2), (low_a, self.a2), (torch.sigmoid(low_g), self.g2)]
        w, a, g, *rate_v = times(*up, *((low, self.v2) for low in low_v))
        w = decay(w, self.w0)
        if self.first:
            v_first = v
        else:
            v = value_residual(v, v_first, *rate_v, self.v0)
        k, remove, add = keys(k, a, self.a0, self.k_k, self.k_a, self.n_head)
        heads = (x.unflatten(-1, (self.n_head, -1)) for x in (r, w, k, v, remove, add))
        y, wkv = wkv7(*heads, wkv, reset)
        out = head_output(y.flatten(2), r, k, v, g, self.r_k, self.ln_x.weight, self.ln_x.bias)
        return self.output(out), last, wkv, v_first


class ChannelMix(nn.Module):
    """The feed-forward part: out = Wv relu(k)^2."""

    def __init__(self, c: RWKV7Config):
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, c.n_embd))
        self.key = Linear(c.n_embd, c.n_ffn)
        self.value = Linear(c.n_ffn, c.n_embd)

    def forward(self, x: Tensor, last: Tensor, reset: Tensor | None):
        xk, last = token_shift_mix(x, last, reset, 1 - self.x_k)
        return self.value(squared_relu(self.key(xk))), last


class RWKV7(RWKV):
    """RWKV-7 language model; see `RWKV.forward` for the call."""

    name = "RWKV-7"
    adam_eps = 1e-18
    tuned_state = ("wkv",)  # as elsewhere, where a tuned state's shifts are zero
    not_multiplied = (*RWKV.not_multiplied, "r_k")

    def __init__(self, config: RWKV7Config):
        super().__init__(config, ((TimeMix(config, i == 0), ChannelMix(config)) for i in range(config.n_layer)))

    def zero_wkv(self, batch: int, **like) -> Tensor:
        c = self.config
        return torch.zeros(batch, c.n_layer, c.n_head, c.head_size, c.head_size, **like)

    @torch.no_grad()
    def init_weights(self) -> "RWKV7":
        """Fresh weights for training from scratch (design note models.md, after RWKV-LM's v7 trainer)."""
        c = self.config
        self.emb.weight.uniform_(-1e-4, 1e-4)
        orthogonal_(self.head.weight, 0.5)
        n = torch.arange(c.n_embd)
        line = n / max(c.n_embd - 1, 1)  # 0 at the first channel, 1 at the last
        tilt = line - 0.5
        middle = (c.head_size - 1) / 2
        zigzag = (n % c.head_size - middle) / max(middle, 0.5)  # -1 at a head's first channel, 1 at its last
        zigzag = zigzag * zigzag.abs()
        for i, block in enumerate(self.blocks):
            depth = i / (c.n_layer - 1) if c.n_layer > 1 else 0.0  # 0 at the first layer, 1 at the last
            rest = 1 - i / c.n_layer  # 1 at the first layer, towards 0
            att, ffn, channel = block.att, block.ffn, n / c.n_embd
            for x, power in ((att.x_r, 0.2), (att.x_w, 0.9), (att.x_k, 0.7)):
                x.copy_(1 - channel ** (power * rest))
            for x, power in ((att.x_v, 0.7), (att.x_a, 0.9), (att.x_g, 0.2)):
                x.copy_(1 - channel ** (power * rest))
            ffn.x_k.copy_(1 - channel ** (rest**4))
            att.w0.copy_(-6 + 6 * line ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
            att.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * tilt)
            low_rank = [(att.w1, att.w2), (att.a1, att.a2), (att.g1, att.g2)]
            if i > 0:
                att.v0.copy_(0.73 - 0.4 * tilt)
                low_rank.insert(2, (att.v1, att.v2))
            for down, up in low_rank:
                down.zero_()
                nn.init.orthogonal_(up, gain=0.1)
            att.k_k.copy_(0.71 - 0.1 * tilt)
            att.k_a.fill_(1.02)
            att.r_k.fill_(-0.04)
            att.ln_x.weight.fill_(((1 + i) / c.n_layer) ** 0.7)
            att.ln_x.bias.zero_()
            att.output.weight.zero_()
            ffn.value.weight.zero_()
            for layer, gain in ((att.receptance, 1), (att.value, 1), (ffn.key, 1), (att.key, 0.1)):
                nn.init.orthogonal_(layer.weight, gain=gain)
        return self
