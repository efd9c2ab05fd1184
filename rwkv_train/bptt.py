"""The one loss: a long text in chunks, with gradients through all of them and the memory of one.

Used by training and by feedback. See "Chunk and horizon" in docs/train.md for the picture.
"""

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_train.models.base import RWKV
from rwkv_train.models.loss import IGNORE_INDEX, head_loss
from rwkv_train.models.state import State

HEAD = "model.head.weight"


def chunked_loss(
    model: RWKV,
    tokens: Tensor,
    targets: Tensor,
    state: State | None,
    reset: Tensor | None,
    chunk_len: int,
    recompute: bool = True,
    *,
    z_loss: float = 0.0,
    checkpoint_blocks: bool = False,
) -> tuple[Tensor, Tensor, State]:
    """Summed cross entropy of a text read in chunks of `chunk_len` tokens; exact gradients through all chunks.

    tokens [B,T] int64; targets [B,T] int64, -100 = not trained; state of B lanes or None (empty);
    reset [B,T] bool or None, True where a token opens a document.
    recompute: run each chunk's forward again in the backward, so that activations of one chunk live at a time.
    checkpoint_blocks: the same for each block inside a chunk: less memory, one more forward.
    Returns (loss_sum in nats, trained tokens int64, state after the last token, attached to the graph).
    The gradient to an incoming state flows too. Double backward is not supported.
    """
    if chunk_len < 1:
        raise ValueError(f"chunk_len must be at least 1, found {chunk_len}")
    if targets.shape != tokens.shape or (reset is not None and reset.shape != tokens.shape):
        shapes = [list(t.shape) for t in (tokens, targets, reset) if t is not None]
        raise ValueError(f"tokens, targets and reset must have one shape [B,T], found {shapes}")
    state = model.empty_state(tokens.shape[0]) if state is None else state
    chunk = _ChunkLoss(model, z_loss, checkpoint_blocks)
    n_tokens = (targets != IGNORE_INDEX).sum()
    cuts = [slice(i, i + chunk_len) for i in range(0, tokens.shape[1], chunk_len)]
    again = recompute and len(cuts) > 1 and torch.is_grad_enabled()
    if again and not is_sharded(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        loss, *state = _Sweep.apply(chunk, cuts, tokens, targets, reset, *state, *trained)
        return loss, n_tokens, State(*state)
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for cut in cuts:
        inputs = *_cut(cut, tokens, targets, reset), *state
        loss, *state = checkpoint(chunk, *inputs, use_reentrant=False) if again else chunk(*inputs)
        total = total + loss
    return total.to(loss.dtype), n_tokens, State(*state)


def _cut(cut: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[:, cut] for t in tensors]


class _ChunkLoss(nn.Module):
    """One chunk as a module, so that `functional_call` can swap its parameters."""

    def __init__(self, model: RWKV, z_loss: float, checkpoint_blocks: bool):
        super().__init__()
        self.model, self.z_loss, self.checkpoint_blocks = model, z_loss, checkpoint_blocks

    def forward(self, tokens, targets, reset, *state, head=None, then=lambda *results: results):
        """head: its weight in the dtype of matrix products, where it is at hand. then: what to do with the results
        while the parameters are swapped; a backward is, since checkpointed blocks read them once more in it."""
        x, state = self.model.hidden(tokens, State(*state), reset, checkpoint_blocks=self.checkpoint_blocks)
        return then(head_loss(x, self.model.head.weight, targets, self.z_loss, head), *state)


class _Sweep(torch.autograd.Function):
    """Forward without activations, keeping the state before each chunk; backward chunk by chunk from the end.

    States at the boundaries lie in one buffer each: many small tensors pinned between large freed ones would fragment
    the heap and let memory grow with the text. The backward differentiates detached aliases of the parameters,
    so that hooks on the parameters (DDP's) fire once a step and not once a chunk. What autocast would cast again for
    every chunk is cast once and kept until the backward ends; gradients still add up in the parameters' own dtype.
    """

    @staticmethod
    def forward(ctx, chunk, cuts, tokens, targets, reset, *state_and_params):
        n_state = len(State._fields)
        state, params = state_and_params[:n_state], state_and_params[n_state:]
        device = tokens.device
        ctx.autocast = {
            "dtype": torch.get_autocast_dtype(device.type),
            "enabled": torch.is_autocast_enabled(device.type),
            "cache_enabled": False,  # it would keep weights cast here, outside the graph, for later use inside one
        }
        draws = chunk.training and any(block.dropout for block in chunk.model.blocks)
        random = rng_states if draws else lambda _: []
        before = [_rows(len(cuts), s) for s in state]
        ctx.rng = [_rows(len(cuts), s) for s in random(device)]
        cast = _cast_once(chunk, ctx.autocast)
        weights, head = _apart(cast)
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.autocast(device.type, **ctx.autocast):
            for i, cut in enumerate(cuts):
                for buffer, s in zip(before + ctx.rng, [*state, *random(device)], strict=True):
                    buffer[i].copy_(s)
                inputs = *_cut(cut, tokens, targets, reset), *state
                loss, *state = torch.func.functional_call(chunk, weights, inputs, head, tie_weights=False)
                total += loss
        ctx.chunk, ctx.cuts, ctx.cast = chunk, cuts, list(cast)
        ctx.save_for_backward(tokens, targets, reset, *before, *cast.values(), *params)
        return total.to(loss.dtype), *[s.clone() for s in state]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_loss, *g_state):
        tokens, targets, reset, *rest = ctx.saved_tensors
        before, rest = rest[: len(g_state)], rest[len(g_state) :]
        cast, params = dict(zip(ctx.cast, rest, strict=False)), rest[len(ctx.cast) :]
        cast, head = _apart(cast)
        leaves, weights, sums = _stand_ins(ctx.chunk, params, cast)
        device = tokens.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=bool(ctx.rng), device_type=device.type):
            for i in reversed(range(len(ctx.cuts))):
                if ctx.rng:
                    set_rng_states([buffer[i] for buffer in ctx.rng], device)
                state = [buffer[i].detach().requires_grad_() for buffer in before]
                inputs = *_cut(ctx.cuts[i], tokens, targets, reset), *state
                then = functools.partial(_backward, (g_loss, *g_state), [*state, *leaves])
                with torch.enable_grad(), torch.autocast(device.type, **ctx.autocast):
                    torch.func.functional_call(ctx.chunk, weights, inputs, head | {"then": then}, tie_weights=False)
                g_state = [s.grad for s in state]
                del state, inputs, then
        return None, None, None, None, None, *g_state, *[sums.get(i, leaf.grad) for i, leaf in enumerate(leaves)]


def _backward(arriving: tuple[Tensor, ...], leaves: list[Tensor], *results: Tensor) -> None:
    with torch.autocast(results[0].device.type, enabled=False):
        torch.autograd.backward(results, arriving, inputs=leaves)


def _cast_once(chunk: _ChunkLoss, autocast: dict) -> dict[str, Tensor]:
    """The weights of matrix products as autocast would cast them, by name; none where it is off."""
    if not autocast["enabled"]:
        return {}
    weights = chunk.model.multiplied().items()
    return {f"model.{name}": p.detach().to(autocast["dtype"]) for name, p in weights if p.dtype != torch.float64}


def _apart(cast: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights to be swapped in, and the head's, which the loss takes besides: it gives its gradient in 32 bits."""
    blocks = {name: weight for name, weight in cast.items() if name != HEAD}
    return blocks, {"head": cast[HEAD]} if HEAD in cast else {}


def _stand_ins(chunk: _ChunkLoss, params: list[Tensor], cast: dict[str, Tensor]) -> tuple[list, dict, dict]:
    """What a backward of many chunks differentiates in place of the parameters.

    Returns detached leaves, one for each of params; by name, all that is to be swapped in; and the sums over the chunks
    of those gradients that come in another dtype than the parameter's, by the number of the parameter.
    """
    names, sums = {id(p): name for name, p in chunk.named_parameters()}, {}
    leaves = {id(p): cast.get(names[id(p)], p).detach().requires_grad_() for p in params}
    for i, (p, leaf) in enumerate(zip(params, leaves.values(), strict=True)):
        if leaf.dtype != p.dtype:
            leaf.register_post_accumulate_grad_hook(functools.partial(_add_up, sums, i, p.dtype))
    every = chunk.named_parameters(remove_duplicate=False)
    return list(leaves.values()), cast | {name: leaves[id(p)] for name, p in every if id(p) in leaves}, sums


def _add_up(sums: dict[int, Tensor], i: int, dtype: torch.dtype, leaf: Tensor) -> None:
    """Take a chunk's gradient off a leaf and add it to the sum."""
    sums[i] = sums[i].add_(leaf.grad) if i in sums else leaf.grad.to(dtype)
    leaf.grad = None


def is_sharded(model: nn.Module) -> bool:
    """Whether a strategy keeps each weight in pieces on several ranks (FSDP, ZeRO-3): the sweep cannot alias those."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def _rows(count: int, like: Tensor) -> Tensor:
    return like.new_empty((count, *like.shape))


def rng_states(device: torch.device) -> list[Tensor]:
    """Of the random numbers that a computation on a device draws: the CPU's, and the GPU's where it is one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_states(states: list[Tensor], device: torch.device) -> None:
    """Go on drawing from where `rng_states` was taken."""
    torch.set_rng_state(states[0].clone())  # torch crashes on a row of a tensor
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1].clone(), device)
