"""What every RWKV generation shares: blocks, initialisation helpers, the outer shape of a model."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rwkv_train.models.state import State
from rwkv_train.ops.linear import linear


def orthogonal_(weight: Tensor, scale: float = 1.0) -> None:
    """Orthogonal rows or columns times scale, with gain sqrt(out/in) where a matrix [out,in] widens."""
    rows, columns = weight.shape
    nn.init.orthogonal_(weight, gain=scale * max(1.0, (rows / columns) ** 0.5))


class Linear(nn.Linear):
    """A matrix, without a bias, that is also fast for a token at a time; see `rwkv_train.ops.linear`."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class LayerNorm(nn.LayerNorm):
    """Layer norm whose weights may have another dtype than its input; statistics are float32 or better."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


class Block(nn.Module):
    """x += Att(LN1 x); x += Ffn(LN2 x), with the embedding's norm in front of the first block.

    Called as block(x [B,T,C], shift [B,2,C], wkv [B,...], reset, carry); returns x, shift, wkv and carry, advanced.
    carry is what a generation hands from block to block besides x, within one forward: RWKV-7 the first block's
    values [B,T,C], RWKV-4 nothing (None).
    """

    def __init__(self, n_embd: int, att: nn.Module, ffn: nn.Module, first: bool, dropout: float):
        super().__init__()
        self.ln0 = LayerNorm(n_embd) if first else None
        self.ln1 = LayerNorm(n_embd)
        self.ln2 = LayerNorm(n_embd)
        self.att = att
        self.ffn = ffn
        self.dropout = dropout

    def forward(self, x: Tensor, shift: Tensor, wkv: Tensor, reset: Tensor | None, carry: Tensor | None):
        if self.ln0 is not None:
            x = self.ln0(x)
        att_last, ffn_last = shift.unbind(1)
        out, att_last, wkv, carry = self.att(self.ln1(x), att_last, wkv, reset, carry)
        x = x + self._dropped(out)
        out, ffn_last = self.ffn(self.ln2(x), ffn_last, reset)
        x = x + self._dropped(out)
        return x, torch.stack([att_last, ffn_last], 1), wkv, carry

    def _dropped(self, out: Tensor) -> Tensor:
        return F.dropout(out, self.dropout) if self.training and self.dropout else out


class RWKV(nn.Module):
    """Embedding, a stack of blocks, head.

    A generation is a subclass: its `name` and `adam_eps` (of its training recipe), its time mix and channel mix,
    the shape of its state and its fresh weights.
    """

    name: str
    adam_eps: float
    tuned_state = ("shift", "wkv")  # parts of the state to begin in that model.tune: state trains
    not_multiplied = ("emb.weight", ".up0", ".down0")  # ends of the names of matrices that enter no product

    def __init__(self, config, blocks: Iterable[tuple[nn.Module, nn.Module]]):
        """config: sizes; blocks: the time mix and the channel mix of every layer."""
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config.n_embd, att, ffn, i == 0, config.dropout) for i, (att, ffn) in enumerate(blocks)
        )
        self.ln_out = LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        self.register_parameter("initial_shift", None)
        self.register_parameter("initial_wkv", None)

    def empty_state(self, batch: int) -> State:
        """The state before a document's first token, for `batch` lanes.

        A model that begins elsewhere than at nothing has it as initial_shift [1,L,2,C] and initial_wkv [1,L,...].
        """
        if self.initial_wkv is None:
            return self.zero_state(batch)
        return State(*(part.expand(batch, *part.shape[1:]) for part in (self.initial_shift, self.initial_wkv)))

    def zero_state(self, batch: int) -> State:
        """The state that knows nothing, for `batch` lanes."""
        c, like = self.config, {"dtype": self.state_dtype, "device": self.device}
        return State(torch.zeros(batch, c.n_layer, 2, c.n_embd, **like), self.zero_wkv(batch, **like))

    def zero_wkv(self, batch: int, **like) -> Tensor:
        """The time mixes' part of it [B,L,...], with the dtype and device of `like`."""
        raise NotImplementedError

    def trainable_state(self) -> State:
        """`zero_state` of one lane in a form that gradients come through."""
        return self.zero_state(1)

    def repair_initial_state(self) -> None:
        """Put the initial state, after a gradient step, back into what a text could leave."""

    def enter(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first block gets: x [B,T,C] and carry."""
        return self.emb(tokens), None

    def forward(self, tokens: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits of the next token at every position.

        tokens [B,T] int64; state of B lanes (None: empty); reset [B,T] bool, True where a token opens a document.
        Returns (logits [B,T,V] in the model's dtype or a wider one, state after the last token).
        """
        x, state = self.hidden(tokens, state, reset)
        return self.head(x), state

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        checkpoint_blocks: bool = False,
        into: State | None = None,
    ) -> tuple[Tensor, State]:
        """As `forward`, but stops before the head: (x [B,T,C], state). The loss needs logits only piecewise.

        checkpoint_blocks: keep no activations inside a block; the backward runs each block's forward a second time.
        into: where the state after the last token is written and returned, without gradients; `state` itself will do.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [B,T] with T >= 1, found {list(tokens.shape)}")
        state = self.empty_state(tokens.shape[0]) if state is None else state
        if state.shift.shape[0] != tokens.shape[0]:
            raise ValueError(f"state has {state.shift.shape[0]} lanes and tokens {tokens.shape[0]}; they must agree")
        if reset is not None and self.initial_wkv is not None:
            return self._hidden_from_initial(tokens, state, reset, checkpoint_blocks, into)
        x, carry = self.enter(tokens)
        shifts, wkvs = [], []
        for i, (block, shift, wkv) in enumerate(zip(self.blocks, *(t.unbind(1) for t in state), strict=True)):
            if checkpoint_blocks and torch.is_grad_enabled():
                draws = block.training and block.dropout > 0
                inputs = x, shift, wkv, reset, carry
                x, shift, wkv, carry = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)
            else:
                x, shift, wkv, carry = block(x, shift, wkv, reset, carry)
            shifts.append(shift)
            if into is None:
                wkvs.append(wkv)
            else:
                into.wkv[:, i] = wkv  # while it is in the processor's cache
        if into is None:
            return self.ln_out(x), State(torch.stack(shifts, 1), torch.stack(wkvs).transpose(0, 1))
        torch.stack(shifts, 1, out=into.shift)
        return self.ln_out(x), into

    def _hidden_from_initial(
        self, tokens, state: State, reset: Tensor, checkpoint_blocks: bool, into: State | None
    ) -> tuple[Tensor, State]:
        """Blocks reset to nothing. Where documents begin otherwise, they are read from one beginning to the next."""
        cuts, xs = sorted({0, *reset.any(0).nonzero().flatten().tolist()}), []
        for start, end in pairwise([*cuts, tokens.shape[1]]):
            begins, initial = reset[:, start], self.empty_state(len(tokens))
            pairs = zip(initial, state, strict=True)
            state = State(*(torch.where(begins.view(-1, *[1] * (s.ndim - 1)), i, s) for i, s in pairs))
            x, state = self.hidden(tokens[:, start:end], state, None, checkpoint_blocks, into)
            xs.append(x)
        return torch.cat(xs, 1), state

    def multiplied(self) -> dict[str, nn.Parameter]:
        """The weights of matrix products by name, which autocast casts; without those in few bits."""
        named = self.named_parameters(remove_duplicate=False)
        plain = {name: p for name, p in named if p.ndim == 2 and type(p) is nn.Parameter}
        return {name: p for name, p in plain.items() if not name.endswith(self.not_multiplied)}

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's. Where a model of 16 bits has matrices in float32, x is float32 from the first of them on."""
        return self.emb.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32
