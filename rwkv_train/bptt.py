"""The one loss: a long text in chunks, with gradients through all of them and the memory of one.

Used by training and by feedback. See "Chunk and horizon" in docs/train.md for the picture.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_train.models.base import RWKV
from rwkv_train.models.loss import IGNORE_INDEX, head_loss
from rwkv_train.models.state import State


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

    def forward(self, tokens, targets, reset, *state):
        x, state = self.model.hidden(tokens, State(*state), reset, checkpoint_blocks=self.checkpoint_blocks)
        return head_loss(x, self.model.head.weight, targets, self.z_loss), *state


class _Sweep(torch.autograd.Function):
    """Forward without activations, keeping the state before each chunk; backward chunk by chunk from the end.

    States at the boundaries lie in one buffer each: many small tensors pinned between large freed ones would fragment
    the heap and let memory grow with the text. The backward differentiates detached aliases of the parameters,
    so that hooks on the parameters (DDP's) fire once a step and not once a chunk.
    """

    @staticmethod
    def forward(ctx, chunk, cuts, tokens, targets, reset, *state_and_params):
        n_state = len(State._fields)
        state, params = state_and_params[:n_state], state_and_params[n_state:]
        device = tokens.device.type
        ctx.autocast = {
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        before = [_rows(len(cuts), s) for s in state]
        ctx.rng = [_rows(len(cuts), s) for s in rng_states(tokens.device)]
        total = torch.zeros((), dtype=torch.float64, device=tokens.device)
        # Without autocast's cache: it would keep weights cast here, outside the graph, for later use inside one.
        with torch.autocast(device, cache_enabled=False, **ctx.autocast):
            for i, cut in enumerate(cuts):
                for buffer, s in zip(before + ctx.rng, [*state, *rng_states(tokens.device)], strict=True):
                    buffer[i].copy_(s)
                loss, *state = chunk(*_cut(cut, tokens, targets, reset), *state)
                total += loss
        ctx.chunk, ctx.cuts = chunk, cuts
        ctx.save_for_backward(tokens, targets, reset, *before, *params)
        return total.to(loss.dtype), *[s.clone() for s in state]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_loss, *g_state):
        tokens, targets, reset, *rest = ctx.saved_tensors
        before, params = rest[: len(g_state)], rest[len(g_state) :]
        alias = {id(p): p.detach().requires_grad_() for p in params}
        leaves = list(alias.values())
        names = ctx.chunk.named_parameters(remove_duplicate=False)
        swapped = {name: alias[id(p)] for name, p in names if id(p) in alias}
        device = tokens.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
            for i in reversed(range(len(ctx.cuts))):
                set_rng_states([buffer[i] for buffer in ctx.rng], device)
                state = [buffer[i].detach().requires_grad_() for buffer in before]
                inputs = *_cut(ctx.cuts[i], tokens, targets, reset), *state
                with torch.enable_grad(), torch.autocast(device.type, **ctx.autocast):
                    out = torch.func.functional_call(ctx.chunk, swapped, inputs, tie_weights=False)
                torch.autograd.backward(out, (g_loss, *g_state), inputs=[*state, *leaves])
                g_state = [s.grad for s in state]
                del out, state, inputs
        return None, None, None, None, None, *g_state, *[p.grad for p in leaves]


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
