"""How much memory corrections take, counted before anything is measured, and what is trained where that is too much."""

import os
from dataclasses import replace

import torch

from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.trainable import curved_names, localised_names, upper_names
from rwkv_train.models.base import RWKV
from rwkv_train.ops.products import is_quantised, quantised_bytes

PROGRAM = 500_000_000  # bytes that torch and the program take themselves
PREDICTED = 7_000  # tokens whose predictions, a number for each of the vocabulary, are in memory at once
READ = 1_000  # tokens whose activations are
COPIES = {"upper": 4, "localised": 4, "full": 3, "state": 1}  # in use, after, gradients, directions
OF_FACTORS = 3  # in use, with its change, gradients


def needed(model: RWKV, config: FeedbackConfig) -> int:
    """Bytes at the peak of a correction, the model counted. Of more than one correction, and of short ones."""
    weights, c = dict(model.named_parameters()), model.config
    named = {"upper": upper_names(model, config.layers), "full": list(weights), "state": []}
    names = named.get(config.trainable, localised_names(model, config.layers))
    copies = COPIES.get(config.trainable, OF_FACTORS) * 4 * sum(weights[name].numel() for name in names)
    curved, both = curved_names(model, config.trainable, config.layers)
    sides = [weights[name].shape[1] for name in curved] + [weights[name].shape[0] for name in both]
    inverses = 4 * sum(n * n for n in sides) + 3 * 4 * max(sides) ** 2  # those of the largest one's inversion
    reading = 4 * READ * c.n_embd * (c.n_layer + 24)  # what a block is given, and the inside of one
    predictions = 4 * PREDICTED * c.vocab_size
    return PROGRAM + bytes_of(model) + copies + inverses + reading + predictions


def bytes_of(model: RWKV) -> int:
    """Of a model's weights as they lie in memory."""
    return sum(quantised_bytes(p) if is_quantised(p) else p.nbytes for p in model.parameters())


def fitting(model: RWKV, config: FeedbackConfig, memory: int) -> FeedbackConfig:
    """The settings, or those nearest to them with which corrections fit into `memory` bytes; at the worst, the least.

    What upper and full train gives way to localised, of as many layers as there is room for.
    """
    if needed(model, config) <= memory or config.trainable == "state":
        return config
    trainable = "localised" if config.trainable in ("upper", "full") else config.trainable
    half = len(localised_names(model))
    tried = [replace(config, trainable=trainable, layers=n) for n in range(config.layers or half, 0, -1)]
    return next((c for c in tried if needed(model, c) <= memory), tried[-1])


def told_of(model: RWKV, config: FeedbackConfig, memory: int) -> str:
    """What people are told where fewer layers than usual are trained, or the settings do not fit; "" otherwise."""
    need = needed(model, config)
    if not config.layers and need <= memory:
        return ""
    short = "" if need <= memory else ", which is more than there is"
    where = f" of the upper {config.layers} layers" if config.layers else ""
    return (
        f"corrections train {config.trainable}{where} (settings trainable and layers): "
        f"about {need / 2**30:.1f} GB of {memory / 2**30:.1f}{short}"
    )


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory that a program may count on: nine tenths of all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * 9 // 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10
