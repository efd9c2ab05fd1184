"""Online fine-tuning trainer for RWKV language models.

Axes, everywhere: B lanes (batch rows), T tokens, C channels, H heads, N head size, V vocabulary, L layers.

On a CPU that other processes use, too, set OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=300 before torch is imported:
torch's threads otherwise wait for each other in a loop. `train.py` does so where it begins beside others
(program.let_threads_sleep).
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load_model` and `save_model`, imported on first use so that `import rwkv_train` stays instant."""
    if name in ("load_model", "save_model"):
        from rwkv_train.checkpoints import modelfile

        return getattr(modelfile, name)
    raise AttributeError(f"module 'rwkv_train' has no attribute {name!r}")
