"""Parameter groups and learning-rate schedules of the RWKV recipe (design note models.md)."""

import math

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
