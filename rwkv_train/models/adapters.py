"""Training little of a model: low-rank factors beside its matrices, or the state in which documents begin.

What such a training changes is an adapter: a few tensors that are kept in a file of their own, and put on the model
they were trained on.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State
from rwkv_train.program import trim_heap

STATE = ("initial_shift", "initial_wkv")


class LowRank(nn.Linear):
    """A linear layer with weight + up [out,r] down [r,in] in place of its weight; up begins at 0 (Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self.up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        self.down = nn.Parameter(torch.randn(rank, layer.in_features).to(layer.weight) / layer.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, low = super().forward(rows), F.linear(rows, self.down)
        y.addmm_(low.to(y.dtype), self.up.t().to(y.dtype))  # a sum of its own would fragment the heap
        return y.view(*x.shape[:-1], -1)


class Quantised(LowRank):
    """With its weight in 8 bits a number, each row with its scale; in a state dict it is as it computes."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__(layer, rank)
        quantize_, config = _torchao()
        quantize_(self, config)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.dequantize()

    def _load_from_state_dict(self, state_dict, prefix, *more):
        name = f"{prefix}weight"
        if name in state_dict:
            if not torch.equal(self.weight.dequantize(), state_dict[name]):
                raise ValueError(f"{name} is not that of model.init in 8 bits; resume with the settings of before")
            state_dict[name] = self.weight  # it never changes
        super()._load_from_state_dict(state_dict, prefix, *more)


def quantise(model: RWKV) -> RWKV:
    """Keep the matrices of a model's blocks in 8 bits a number, each row with its scale; embedding and head stay.

    The model itself is returned; nothing of it requires gradients. ValueError where torchao is not installed.
    """
    quantize_, config = _torchao()
    for block in model.requires_grad_(False).blocks:
        quantize_(block, config)
        trim_heap()  # what was freed would not be used again
    return model


def quiet_torchao() -> None:
    """To be called before it is imported: it misses its GPU libraries aloud, and torch minds its habits."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _torchao():
    """Its function, and the settings of 8 bits with a scale for each row."""
    quiet_torchao()
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError("int8 needs torchao: pip install 'rwkv_train[quantise]'") from None
    return quantize_, Int8WeightOnlyConfig()


def tune(model: RWKV, what: str, rank: int, base: str = "float") -> None:
    """Make only a part of a model trainable. what: "lora", factors of all matrices in the blocks; "state".

    base: how those matrices are kept, "float" or "int8". ValueError where torchao is not installed.
    """
    model.requires_grad_(False)
    if what == "state":
        begin_in(model, model.trainable_state() if model.initial_wkv is None else model.empty_state(1))
        return
    kind = Quantised if base == "int8" else LowRank
    for block in model.blocks:
        for mix in (block.att, block.ffn):
            for name, layer in list(mix.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(mix, name, kind(layer, rank))


def begin_in(model: RWKV, state: State) -> None:
    """Let documents begin in a state of one lane, and the model's `tuned_state` of it be trainable."""
    for name, part in state._asdict().items():
        part = nn.Parameter(part.detach().clone(), requires_grad=name in model.tuned_state)
        setattr(model, f"initial_{name}", part)


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return name in STATE or name.endswith((".up", ".down"))


@torch.no_grad()
def put_on(model: RWKV, adapter: dict[str, Tensor], source: Path) -> None:
    """Add factors to a model's weights, and let it begin in an adapter's state. Raises ValueError for a misfit.

    Of a state the shifts may be missing; they are zero then.
    """
    weights = dict(model.named_parameters())
    if any(name in adapter for name in STATE):
        state = model.zero_state(1)
        parts = [adapter.get(name, like) for name, like in zip(STATE, state, strict=True)]
        for name, part, like in zip(STATE, parts, state, strict=True):
            _fit(source, f"the state to begin in ({name}, {list(part.shape)})", part.shape == like.shape)
        begin_in(model, State(*(part.to(like) for part, like in zip(parts, state, strict=True))))
    for layer in sorted({name.rpartition(".")[0] for name in adapter if name not in STATE}):
        weight, up, down = weights.get(f"{layer}.weight"), adapter.get(f"{layer}.up"), adapter.get(f"{layer}.down")
        _fit(source, layer, weight is not None and up is not None and down is not None)
        sizes = [*up.shape, *down.shape]
        _fit(source, layer, len(sizes) == 4 and sizes[1] == sizes[2] and weight.shape == (sizes[0], sizes[3]))
        change = up.to(weight.device).double() @ down.to(weight.device).double()
        weight.copy_((weight.double() + change).to(weight.dtype))


def _fit(source: Path, name: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{source}: {name} does not fit the model; put an adapter on the model it was trained on")
