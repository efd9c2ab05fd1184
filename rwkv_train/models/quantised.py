"""Matrices kept in 8 or 4 bits a number, by torchao; products with them are those of ops/products.py."""

import logging
from math import gcd
from typing import Literal

import torch
from torch import nn

from rwkv_train.models.base import RWKV
from rwkv_train.program import trim_heap

Quantised = Literal["int8", "nf4"]
BITS = {"int8": 8, "nf4": 4}
BLOCK, SCALES = 64, 256  # numbers of nf4 that share a scale, and scales that share one of theirs


def quantise(model: RWKV, kind: Quantised = "int8") -> RWKV:
    """Keep the matrices of a model's blocks in few bits a number; embedding and head stay.

    int8: each row with its scale. nf4: QLoRA's 4-bit numbers (Dettmers et al. 2023), each 64 with a scale of 8 bits.
    The model itself is returned; nothing of it requires gradients. ValueError where torchao is not installed.
    """
    for block in model.requires_grad_(False).blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                quantise_layer(layer, kind)
        trim_heap()  # what was freed would not be used again
    return model


def quantise_layer(layer: nn.Linear, kind: Quantised) -> None:
    """The same for the weight of one layer, which requires no gradient then."""
    quiet_torchao()
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4
    except ImportError:
        raise ValueError(f"{kind} needs torchao: pip install 'rwkv_train[quantise]'") from None
    if kind == "int8":
        quantize_(layer, Int8WeightOnlyConfig())
        return
    weight = layer.weight.detach()
    if weight.numel() % 2:
        raise ValueError(
            f"nf4 keeps two numbers in a byte, and a matrix of {list(weight.shape)} has an odd one; use int8"
        )
    block = gcd(weight.numel(), BLOCK)
    four_bits = to_nf4(weight, block, gcd(weight.numel() // block, SCALES))
    layer.weight = nn.Parameter(four_bits, requires_grad=False)


def kind_of(weight: torch.Tensor) -> Quantised:
    """In which format a weight of few bits is kept."""
    return "int8" if hasattr(weight, "qdata") else "nf4"


def quiet_torchao() -> None:
    """To be called before it is imported: it misses its GPU libraries aloud, and torch minds its habits."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
