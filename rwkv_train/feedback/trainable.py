"""What of a model is trained, and models that differ in a few weights and share all others."""

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rwkv_train.models.base import RWKV
from rwkv_train.models.factors import FACTORS, Kind, begin, change
from rwkv_train.ops.products import as_wide

Trainable = Literal["upper", "full", "localised", "lora", "pissa", "miss", "state"]


def localised_names(model: RWKV, layers: int = 0) -> list[str]:
    """The matrices that trainable localised means: late channel mixes' values."""
    return [f"blocks.{i}.ffn.value.weight" for i in range(_first(model, layers), len(model.blocks))]


def upper_names(model: RWKV, layers: int = 0) -> list[str]:
    """The matrices that trainable upper means: those of the upper layers, and the head."""
    below = tuple(f"blocks.{i}." for i in range(_first(model, layers)))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name in linear if not name.startswith(below)]


def curved_names(model: RWKV, trainable: Trainable, layers: int = 0) -> tuple[list[str], list[str]]:
    """(the matrices whose inputs' curvature a profile has, those of them that have the outputs' as well).

    Unless it was begun with fewer layers than usual, it has what any setting of `trainable` asks for.
    """
    both = localised_names(model, layers)
    return upper_names(model, layers) if trainable == "upper" or not layers else both, both


def _first(model: RWKV, layers: int) -> int:
    """The first layer that may be trained: of so many, but of the upper half at most; 0 is all of that."""
    half = len(model.blocks) // 2
    return max(half, len(model.blocks) - layers) if layers else half


def trained_twin(
    model: RWKV, trainable: Trainable, layers: int = 0, rank: int = 8
) -> tuple[RWKV, dict[str, nn.Parameter]]:
    """(a twin of a model, what of it is trained by name, in float32 at least). `finished` ends the training.

    rank: of the factors of trainable lora, pissa and miss.
    """
    names, own = localised_names(model, layers), dict(model.named_parameters())
    if trainable == "state":
        names = ["initial_shift", "initial_wkv"]
        own = dict(zip(names, model.trainable_state(), strict=True)) | own
    elif trainable == "full":
        names = list(own)
    elif trainable == "upper":
        names = upper_names(model, layers)
    twin = with_weights(model, {name: own[name].detach() for name in names})
    if trainable in get_args(Kind):
        rng = torch.Generator().manual_seed(0)
        for name in names:
            layer = twin.get_submodule(name.removesuffix(".weight"))
            parametrize.register_parametrization(layer, "weight", _Change(layer.weight, trainable, rank, rng))
        names = [n for n, _ in twin.named_parameters() if n.rpartition(".")[2] in FACTORS]
    parameters = {name: p.requires_grad_(True) for name, p in twin.named_parameters() if name in names}
    return twin, parameters


def finished(twin: RWKV, trainable: Trainable) -> RWKV:
    """A trained twin as a model like any other: changes by factors are added to their matrices."""
    if trainable in get_args(Kind):
        for module in filter(parametrize.is_parametrized, list(twin.modules())):
            parametrize.remove_parametrizations(module, "weight")
    return twin.requires_grad_(False)


class _Change(nn.Module):
    """A weight [out,in] plus what factors add to it.

    Not the LowRank of models/adapters.py: that one stays beside its weight and draws from torch's global generator. A
    correction ends as a weight, as it was computed with, and is drawn alike at every replay.
    """

    def __init__(self, weight: Tensor, kind: Kind, rank: int, rng: torch.Generator):
        super().__init__()
        factors = begin(kind, weight.detach(), rank, rng)
        self.trained = tuple(factors)
        for name, factor in factors.items():
            setattr(self, name, nn.Parameter(factor))
        if kind == "pissa":
            weight.sub_(change(factors, weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + change({name: getattr(self, name) for name in self.trained}, weight.shape[1])


def changed(model: RWKV, base: RWKV) -> dict[str, Tensor]:
    """The weights of a corrected model that are not its base's."""
    ours = dict(base.named_parameters())
    return {name: p.detach() for name, p in model.named_parameters() if p is not ours.get(name)}


def with_weights(model: RWKV, weights: dict[str, Tensor]) -> RWKV:
    """A model that has copies of these weights of its own and shares all others with `model`.

    The copies are float32, if not float64, whatever the model's other weights are: corrections are finer than half
    precision. Nothing requires gradients.
    """
    twin = opened(model)
    for name, weight in weights.items():
        module, _, leaf = name.rpartition(".")
        wide = as_wide(weight)
        wide = wide.clone() if wide is weight else wide
        wide = wide.to(model.device)  # a snapshot comes from a file
        setattr(twin.get_submodule(module), leaf, nn.Parameter(wide, requires_grad=False))
    return twin.requires_grad_(False)


def between(before: RWKV, after: RWKV, share: float) -> RWKV:
    """`before` with a share of the way to `after`."""
    start = dict(before.named_parameters())
    twin = with_weights(after, changed(after, before))
    with torch.no_grad():
        for name, weight in changed(twin, after).items():
            weight.copy_(torch.lerp(as_wide(start[name]), weight, share) if name in start else weight * share)
    return twin


def with_children(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A module with some other children; it shares everything else."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def opened(module: nn.Module) -> nn.Module:
    """A module in which layers and weights can be replaced; until then it shares them all, and itself it is new."""
    twin = with_children(module, **{name: opened(child) for name, child in module.named_children()})
    twin._parameters = dict(module._parameters)
    twin._forward_pre_hooks, twin._forward_hooks = module._forward_pre_hooks.copy(), module._forward_hooks.copy()
    return twin
