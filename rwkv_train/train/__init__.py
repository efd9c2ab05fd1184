"""One training run: `fit`, the LightningModule, callbacks, strategies, the optimizer, what a run writes.

Only this room imports lightning, deepspeed and wandb; the network and its loss are below, and know nothing of it.
"""
