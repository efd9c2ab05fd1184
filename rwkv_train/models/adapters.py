"""Training little of a model: factors beside its matrices (models/factors.py), or the state in which documents begin.

What such a training changes is an adapter: a few tensors that are kept in a file of their own, and put on the model
they were trained on. By name: blocks.0.att.key.up and .down, or .miss; .base, some numbers of the matrix beside which
they were trained; and in a run that trains PiSSA .up0 and .down0, what was taken out of it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from rwkv_train.models.base import RWKV
from rwkv_train.models.factors import FACTORS, Kind, add_product, begin, change
from rwkv_train.models.quantised import BITS, kind_of, quantise_layer
from rwkv_train.models.state import State
from rwkv_train.ops.products import dequantised, is_quantised, product

STATE = ("initial_shift", "initial_wkv")
TAKEN_OUT = ("up0", "down0")
SAMPLED = 8  # numbers of a matrix by which it is known again
SAME = {"rtol": 2**-7, "atol": 1e-6}  # how far they may be from those: what rounding to bfloat16 does


class LowRank(nn.Linear):
    """A linear layer [out,in] of whose weight a change by few numbers is trained; the weight itself stays.

    base: how that is kept. In a state dict it is as it computes.
    """

    def __init__(self, layer: nn.Linear, kind: Kind, rank: int, base: Literal["float", "int8", "nf4"] = "float"):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        factors = begin(kind, layer.weight.detach(), rank)
        self.trained = tuple(factors)
        for name, factor in factors.items():
            setattr(self, name, nn.Parameter(factor))
        if kind == "pissa":
            self.weight = _frozen(layer.weight - change(factors, self.in_features))
            for name, factor in zip(TAKEN_OUT, factors.values(), strict=True):
                setattr(self, name, _frozen(factor.clone()))
        if base != "float":
            quantise_layer(self, base)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = add_product(product(rows, self.weight), rows, {name: getattr(self, name) for name in self.trained})
        return y.view(*x.shape[:-1], -1)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_quantised(self.weight):
            destination[f"{prefix}weight"] = dequantised(self.weight)

    def _load_from_state_dict(self, state_dict, prefix, *more):
        name = f"{prefix}weight"
        if name in state_dict and is_quantised(self.weight):
            if not torch.equal(dequantised(self.weight), state_dict[name]):
                bits = BITS[kind_of(self.weight)]
                raise ValueError(f"{name} is not that of model.init in {bits} bits; resume with the settings of before")
            state_dict[name] = self.weight  # it never changes
        super()._load_from_state_dict(state_dict, prefix, *more)


def tune(model: RWKV, what: str, rank: int = 16, base: str = "float", ranks: Sequence[str] = ()) -> None:
    """Make only a part of a model trainable. what: "state", or a kind of factors, of all matrices in the blocks.

    base: how those matrices are kept, "float", "int8" or "nf4". ranks: "PART=RANK" for some of them; PART is a part of
    their names as att, ffn.key or blocks.0-5, the first that fits counts, and 0 leaves a matrix as it is.
    ValueError where torchao is not installed, for a part that names no matrix, and for a rank that none has room for.
    """
    model.requires_grad_(False)
    layers, unused = _matrices(model), set(ranks)
    for name, layer in layers.items():
        sampled = _frozen(sample(layer.weight))
        if what != "state":
            entry = next((entry for entry in ranks if _fits(entry.partition("=")[0], name)), None)
            unused -= {entry}
            if of_this := int(entry.partition("=")[2]) if entry else rank:
                layer = LowRank(layer, what, of_this, base)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer)
        layer.base = sampled
    if unused:
        raise ValueError(
            f"model.ranks: {min(unused)} fits no matrix; these are called as {', '.join(list(layers)[:6])}"
        )
    if what == "state":
        begin_in(model, model.trainable_state() if model.initial_wkv is None else model.empty_state(1))
    model.register_load_state_dict_pre_hook(_take_without_samples)


def _take_without_samples(model: RWKV, state_dict: dict, prefix: str, *_) -> None:
    """Checkpoints of before had no samples of the base."""
    for name, layer in _matrices(model).items():
        state_dict.setdefault(f"{prefix}{name}.base", layer.base)


def _matrices(model: RWKV) -> dict[str, nn.Linear]:
    """Those of the blocks, by name."""
    return {name: m for name, m in model.named_modules() if name.startswith("blocks.") and isinstance(m, nn.Linear)}


def _fits(part: str, name: str) -> bool:
    """Whether a part of a name, in which n-m stands for any number of them, is one of this name."""
    numbers = re.sub(r"(\d+)-(\d+)", lambda m: "|".join(map(str, range(int(m[1]), int(m[2]) + 1))), part)
    words = r"\.".join(f"({word})" for word in numbers.split("."))
    return re.search(rf"(^|\.){words}(\.|$)", name) is not None


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach(), requires_grad=False)


def sample(weight: Tensor) -> Tensor:
    """A few numbers of a matrix, from all over it: [SAMPLED]."""
    at = torch.linspace(0, weight.numel() - 1, SAMPLED, device=weight.device).long()
    return weight.detach().flatten()[at].clone()


def samples(model: RWKV) -> dict[str, Tensor]:
    """Those of the blocks' matrices."""
    return {name: sample(layer.weight) for name, layer in _matrices(model).items()}


def begin_in(model: RWKV, state: State) -> None:
    """Let documents begin in a state of one lane, and the model's `tuned_state` of it be trainable."""
    for name, part in state._asdict().items():
        part = nn.Parameter(part.detach().clone(), requires_grad=name in model.tuned_state)
        setattr(model, f"initial_{name}", part)


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return name in STATE or name.rpartition(".")[2] in (*FACTORS, *TAKEN_OUT, "base")


def relative(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """A run's adapter as it goes on the model that the run began with: of PiSSA, less what was taken out of that."""
    found = {name: t for name, t in adapter.items() if not name.endswith(TAKEN_OUT)}
    for name in [name for name in adapter if name.endswith(".up0")]:
        layer = name.removesuffix(".up0")
        up, down = adapter[f"{layer}.up"], adapter[f"{layer}.down"]
        found[f"{layer}.up"] = torch.cat([up, adapter[name].to(up)], 1)
        found[f"{layer}.down"] = torch.cat([down, -adapter[f"{layer}.down0"].to(down)], 0)
    return found


@torch.no_grad()
def put_on(model: RWKV, adapter: dict[str, Tensor], source: Path, bare: dict[str, Tensor] | None = None) -> None:
    """Add factors to a model's weights, and let it begin in an adapter's state; shifts that are not there are 0.

    bare: samples of the model before any adapter was put on it; this one has to have been trained on that, or on what
    the model is by now. None: it comes with the model. Raises ValueError for a misfit.
    """
    if broken := next((name for name, t in adapter.items() if not t.isfinite().all()), None):
        raise ValueError(f"{source}: {broken} holds numbers that are not finite; train it again")
    weights, layers = dict(model.named_parameters()), {}
    state = model.zero_state(1)
    begins = [adapter.get(name, like) for name, like in zip(STATE, state, strict=True)]
    for name, part, like in zip(STATE, begins, state, strict=True):
        _fit(source, f"the state to begin in ({name}, {list(part.shape)})", part.shape == like.shape)
    for name, t in sorted(adapter.items()):
        layer, _, part = name.rpartition(".")
        if part in FACTORS:
            layers.setdefault(layer, {})[part] = t
    for layer, factors in layers.items():
        weight = weights.get(f"{layer}.weight", weights.get(layer))
        _fit(source, layer, weight is not None and weight.ndim == 2 and _shapes_fit(factors, *weight.shape))
    if bare is not None:
        _check_base(adapter, [bare, samples(model)], source)
    if any(name in adapter for name in STATE):
        begin_in(model, State(*(part.to(like) for part, like in zip(begins, state, strict=True))))
    for layer, factors in layers.items():
        weight = weights.get(f"{layer}.weight", weights.get(layer))
        wide = {name: t.to(weight.device).double() for name, t in factors.items()}
        weight.copy_((weight.double() + change(wide, weight.shape[1])).to(weight.dtype))


def _check_base(adapter: dict[str, Tensor], bases: list[dict[str, Tensor]], source: Path) -> None:
    """ValueError if the numbers that an adapter knows of its base are in none of these."""
    known = {name.removesuffix(".base"): t for name, t in adapter.items() if name.endswith(".base")}
    others = []
    for base in bases:
        pairs = [(name, t.float(), base[name].float().cpu()) for name, t in known.items() if name in base]
        others.append([name for name, a, b in pairs if a.shape != b.shape or not torch.allclose(a, b, **SAME)])
    if all(others):
        count, layer = len(others[0]), others[0][0]
        raise ValueError(
            f"{source} was trained on another model: {count} of {len(known)} matrices, as {layer}, have other numbers "
            "there; put an adapter on the model it was trained on"
        )


def _shapes_fit(factors: dict[str, Tensor], outer: int, inner: int) -> bool:
    shapes = {name: tuple(t.shape) for name, t in factors.items()}
    rank = next((shape[0] for name, shape in shapes.items() if name != "up" and len(shape) == 2), 0)
    return rank > 0 and shapes in ({"up": (outer, rank), "down": (rank, inner)}, {"miss": (rank, outer)})


def _fit(source: Path, name: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{source}: {name} does not fit the model; put an adapter on the model it was trained on")
