"""The models that are measured: sizes by name, weights that all matter, and the same weights in other programs."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from rwkv_train.bptt import chunked_loss
from rwkv_train.checkpoints.modelfile import save_model
from rwkv_train.models import rwkv4, rwkv7
from rwkv_train.models.base import RWKV
from rwkv_train.models.loss import IGNORE_INDEX
from rwkv_train.models.quantised import quiet_torchao
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv7 import wkv7

SIZES = {"256x4": (256, 4, 1024), "169M": (768, 12, 50277), "1.5B": (2048, 24, 50277)}  # channels, layers, vocabulary
HEAD = 64


def size_of(name: str) -> RWKV4Config | RWKV7Config:
    """A size by its name, or as CxL or CxLxV; that of an RWKV-7 after "rwkv7-". ValueError for anything else."""
    size = name.removeprefix("rwkv7-")
    if size in SIZES:
        channels, layers, vocab = SIZES[size]
    elif re.fullmatch(r"\d+x\d+(x\d+)?", size):
        channels, layers, vocab = (*map(int, size.split("x")), 1024)[:3]
    else:
        known = f"{', '.join(SIZES)}, or CxL or CxLxV as 512x8x50277"
        raise ValueError(f"there is no size {name!r}; write {known}, and rwkv7- before it for an RWKV-7")
    if size == name:
        return RWKV4Config(vocab, channels, layers)
    return RWKV7Config(vocab, channels, layers, head_size(channels))


def head_size(channels: int) -> int:
    """RWKV-7's usual one, where it divides the channels."""
    return channels if channels % HEAD else HEAD


@torch.no_grad()
def random_model(config: RWKV4Config | RWKV7Config, seed: int = 0, device: str = "cpu") -> RWKV:
    """Weights in which every one matters: fresh ones are zero in whole matrices, whose products would go unnoticed."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = (RWKV7 if isinstance(config, RWKV7Config) else RWKV4)(config)
        for name, p in model.named_parameters():
            if name.endswith("time_decay"):
                p.uniform_(-5, 2)
            elif "time_mix" in name or ".x_" in name:
                p.uniform_(0, 1)
            elif p.ndim == 1:  # layer norms around 1 and 0, time_first around 0
                p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.2)
            else:
                p.normal_(0, 0.5 * p.shape[1] ** -0.5)
    return model.train()


def random_text(
    config: RWKV4Config | RWKV7Config, lanes: int, tokens: int, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(tokens, targets) [B,T]; the last token of each lane has no target, as in transformers' loss."""
    text = torch.randint(config.vocab_size, (lanes, tokens), generator=torch.Generator().manual_seed(1))
    targets = torch.cat([text[:, 1:], torch.full((lanes, 1), IGNORE_INDEX)], 1)
    return text.to(device), targets.to(device)


def training_step(
    model: RWKV, text: tuple[Tensor, Tensor], precision: str = "fp32", chunk_len: int | None = None
) -> Callable[[], Tensor]:
    """Forward and backward as `fit` does them: the mean loss is returned, gradients are in the parameters."""
    tokens, targets = text

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss, n, _ = chunked_loss(model, tokens, targets, None, None, chunk_len or tokens.shape[1])
        (loss / n).backward()
        return loss.detach() / n

    return step


def truncated_step(
    model: RWKV, text: tuple[Tensor, Tensor], chunk_len: int, precision: str = "fp32", checkpoint_blocks: bool = False
) -> Callable[[], None]:
    """The same text chunk by chunk, the state detached between them: classic truncated backpropagation.

    checkpoint_blocks: blocks keep no activations.
    """

    def step() -> None:
        model.zero_grad(set_to_none=True)
        state = None
        for tokens, targets in zip(*(t.split(chunk_len, 1) for t in text), strict=True):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss, n, state = chunked_loss(
                    model, tokens, targets, state, None, chunk_len, checkpoint_blocks=checkpoint_blocks
                )
            (loss / n).backward()
            state = state.detach()

    return step


def gradients(step: Callable[[], Tensor], model: torch.nn.Module, rename=lambda name: name) -> dict[str, Tensor]:
    """The loss and every gradient of one step."""
    results = {"loss": step()}
    results |= {rename(name): p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return results


@contextmanager
def plain_recurrence() -> Iterator[None]:
    """Inside, models run WKV by the specification."""
    usual = rwkv4.wkv4, rwkv7.wkv7
    rwkv4.wkv4, rwkv7.wkv7 = (partial(operator, backend="reference") for operator in (wkv4, wkv7))
    try:
        yield
    finally:
        rwkv4.wkv4, rwkv7.wkv7 = usual


def reference_gradients(model: RWKV, text: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients in float64, by the specification."""
    exact = deepcopy(model).double()
    with plain_recurrence():
        return gradients(training_step(exact, text), exact)


def quiet_transformers() -> ModuleType:
    """The package transformers, without remarks of its own and of what it loads. ImportError if not installed."""
    quiet_torchao()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def in_transformers(model: RWKV4) -> torch.nn.Module:
    """The same weights as transformers' RWKV-4. ImportError where it is not installed."""
    transformers = quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "hf/")
        return transformers.RwkvForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32).train()


def transformers_step(theirs: torch.nn.Module, tokens: Tensor, precision: str = "fp32") -> Callable[[], Tensor]:
    """Forward and backward as `training_step`'s. Targets are the tokens themselves, which it moves by one."""

    def step() -> Tensor:
        theirs.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = theirs(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def their_names(model: RWKV4, theirs: torch.nn.Module) -> dict[str, str]:
    """Their name of a parameter: ours. Both programs list the same parts in the same order."""
    return dict(zip(dict(theirs.named_parameters()), dict(model.named_parameters()), strict=True))
