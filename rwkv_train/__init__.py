"""Online fine-tuning trainer for RWKV language models.

Axes, everywhere: B lanes (batch rows), T tokens, C channels, H heads, N head size, V vocabulary, L layers.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load_model` and `save_model`, imported on first use so that `import rwkv_train` stays instant."""
    if name in ("load_model", "save_model"):
        from rwkv_train.checkpoints import modelfile

        return getattr(modelfile, name)
    raise AttributeError(f"module 'rwkv_train' has no attribute {name!r}")
