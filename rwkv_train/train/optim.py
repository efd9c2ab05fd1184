"""Parameter groups and learning-rate schedules of the RWKV recipe (design note models.md)."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from rwkv_train.config import OptimConfig
from rwkv_train.models.base import RWKV

MULTIPLIERS = {"time_decay": 2.0, "time_first": 3.0, "w0": 2.0}  # how much faster than the rest these learn


def rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step 0 <= step < steps, for parameters with multiplier 1."""
    lr, floor = config.lr, config.lr / 10 if config.min_lr is None else config.min_lr
    if step < config.warmup:
        return lr * (step + 1) / (config.warmup + 1)
    done = min(1.0, (step - config.warmup) / max(1, steps - 1 - config.warmup))  # 0 after warmup, 1 at the last step
    match config.schedule:
        case "constant":
            return lr
        case "linear":
            return lr + (floor - lr) * done
        case "exponential":
            return lr * (floor / lr) ** done
        case "cosine":
            return floor + (lr - floor) * (1 + math.cos(math.pi * done)) / 2
        case "wsd":
            return lr + (floor - lr) * max(0.0, (done - 1 + config.decay_share) / config.decay_share)
    raise AssertionError(config.schedule)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Trainable parameters by learning rate and weight decay: matrices of layers decay, nothing else does."""
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            lr = config.lr * MULTIPLIERS.get(name.rsplit(".", 1)[-1], 1.0)
            decay = config.weight_decay if name.endswith(".weight") and p.ndim == 2 else 0.0
            groups.setdefault((lr, decay), []).append(p)
    return [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


def make_optimizer(model: RWKV, config: OptimConfig, steps: int):
    """(AdamW, its scheduler, to be stepped once per optimizer step)."""
    groups, eps = parameter_groups(model, config), model.adam_eps if config.eps is None else config.eps
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=eps, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(config, step, steps) / config.lr)
    return optimizer, scheduler


def put_in_force(asked, loaded, regroup: bool) -> None:
    """Settings over those that a checkpoint has brought along; moments and the count of steps stay.

    asked, loaded: what `make_optimizer` gives. regroup: sort the parameters anew, as another weight decay may want it;
    DeepSpeed's groups cannot be, since they hold pieces.
    """
    (wanted, fresh), (optimizer, scheduler) = asked, loaded
    if regroup:
        optimizer.param_groups[:] = wanted.param_groups
    scheduler.base_lrs, scheduler.lr_lambdas = fresh.base_lrs, fresh.lr_lambdas
    rates = [base * rate(scheduler.last_epoch) for base, rate in zip(fresh.base_lrs, fresh.lr_lambdas, strict=True)]
    for group, new, lr in zip(optimizer.param_groups, wanted.param_groups, rates, strict=True):
        group.update({name: value for name, value in new.items() if name != "params"} | {"lr": lr})
    scheduler._last_lr = rates


def number_by_model(state: dict, groups: list[dict], parameters: Iterable[torch.Tensor]) -> dict:
    """An optimizer's state dict with its parameters numbered as the model has them, not as its groups do.

    FSDP takes numbers for those of the model; without it, only their order within the groups counts.
    """
    number = {id(p): n for n, p in enumerate(parameters)}
    new = [[number[id(p)] for p in group["params"]] for group in groups]
    pairs = [zip(group["params"], ns, strict=True) for group, ns in zip(state["param_groups"], new, strict=True)]
    names = {old: n for pair in pairs for old, n in pair}
    return {
        "state": {names[old]: moments for old, moments in state["state"].items()},
        "param_groups": [group | {"params": ns} for group, ns in zip(state["param_groups"], new, strict=True)],
    }
