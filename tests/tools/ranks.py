"""`train.py fit` on several CPU ranks, for tests.

    python -m torch.distributed.run --nproc-per-node 2 tests/tools/ranks.py fit ...

Here DeepSpeed runs without a GPU, which Lightning's strategy refuses, and GRADIENTS=PATH writes the gradient of the
first optimizer step.
"""

import os

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from rwkv_train import cli
from rwkv_train.train import fit, module, strategies


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's strategy without its check for CUDA, and with a device that has the number DeepSpeed asks for."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        self.parallel_devices = [torch.device("cpu", rank) for rank in range(self.num_processes)]
        DDPStrategy.setup_environment(self)


def keep_first_gradient(path: str) -> None:
    clip = module.OnlineTrainingModule.configure_gradient_clipping

    def keep(self, *args, **kwargs):
        if self.global_rank == 0 and not os.path.exists(path):
            torch.save({name: p.grad.clone() for name, p in self.model.named_parameters()}, path)
        clip(self, *args, **kwargs)

    module.OnlineTrainingModule.configure_gradient_clipping = keep


if __name__ == "__main__":
    torch.set_num_threads(1)
    strategies.DeepSpeedStrategy = DeepSpeedOnCPU
    strategies.deepspeed.__defaults__ = (DeepSpeedOnCPU,)
    fit._check_machine = lambda config: None
    if path := os.environ.get("GRADIENTS"):
        keep_first_gradient(path)
    cli.main()
