"""One training run: `fit`, the LightningModule, callbacks, strategies, the optimizer, what a run writes.

Only this room imports lightning, deepspeed and wandb.
"""
