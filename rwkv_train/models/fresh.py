"""The sizes of a fresh model, from its settings."""

from dataclasses import asdict

from rwkv_train.config import ModelConfig
from rwkv_train.models.rwkv4 import RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7Config


def fresh_sizes(model: ModelConfig, vocab_size: int) -> RWKV4Config | RWKV7Config:
    """vocab_size: that of the data's tokenizer, for a model that does not say its own."""
    names = ("n_layer", "n_embd", "n_att", "head_size", "n_ffn", "vocab_size")
    sizes = {name: size for name, size in asdict(model).items() if name in names and size}
    return (RWKV7Config if model.architecture == "rwkv7" else RWKV4Config)(**{"vocab_size": vocab_size} | sizes)
