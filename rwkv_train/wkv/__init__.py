"""The operators, for everybody: `wkv4` and `wkv7`. They live in rwkv_train/ops; nothing else belongs here."""

from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv7 import wkv7

__all__ = ["wkv4", "wkv7"]
