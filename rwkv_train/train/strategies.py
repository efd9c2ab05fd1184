"""How a run is spread over devices: Lightning's strategies, set up for recurrent state and one backward a step."""

from contextlib import nullcontext

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from rwkv_train.config import TrainConfig
from rwkv_train.models.base import RWKV


def make_strategy(config: TrainConfig) -> Strategy | str:
    """The strategy that `train.strategy` names. Raises ValueError where it cannot run."""
    ranks = config.devices * config.nodes
    if config.strategy == "fsdp":
        # Whole checkpoints in one file: they load anywhere, on any number of ranks.
        return ModelParallelStrategy(ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if config.strategy.startswith("deepspeed"):
        stage, offload = int(config.strategy.split("_")[2]), config.strategy.endswith("offload")
        return deepspeed(stage, offload)
    return "auto" if ranks == 1 and config.strategy == "auto" else DDPStrategy()


def deepspeed(stage: int, offload: bool, kind: type[DeepSpeedStrategy] = DeepSpeedStrategy) -> DeepSpeedStrategy:
    """ZeRO. AdamW is torch's own, also where it runs on the CPU: its steps are those of every other strategy."""
    # The loader has no batch size to log.
    strategy = kind(stage=stage, offload_optimizer=offload, logging_batch_size_per_gpu=1)
    strategy.config["zero_force_ds_cpu_optimizer"] = False
    return strategy


def shard(model: RWKV, strategy: Strategy, gather_16: bool) -> None:
    """Cut a model's weights up, where the strategy wants the model to do that itself.

    gather_16: the blocks' linear layers are gathered in bfloat16, to which autocast would cast them; what is computed
    with in float32, and all gradients, which are sums over ranks, go in float32. Not for a horizon of several chunks:
    their gradients would add up in 16 bits before that.
    """
    if not is_fsdp(strategy):
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        return
    mesh = strategy.device_mesh["data_parallel"]
    for block in model.blocks:
        if gather_16:
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
            for layer in [m for m in block.modules() if isinstance(m, nn.Linear)]:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # the loss calls this one, and then uses the head's weight


def is_deepspeed(strategy: Strategy) -> bool:
    """Whether DeepSpeed holds the gradients, clips them and writes the checkpoints."""
    return isinstance(strategy, DeepSpeedStrategy)


def is_fsdp(strategy: Strategy) -> bool:
    """Whether weights and the optimizer's state are in pieces that know their names."""
    return isinstance(strategy, ModelParallelStrategy)


def part_of_step_mean(loss_sum: Tensor, step_tokens: Tensor, trainer: Trainer) -> Tensor:
    """What a batch gives to the backward, so that an optimizer step follows the mean over all its trained tokens.

    loss_sum: of this batch, on this rank. step_tokens: trained tokens of the step, over all its batches and ranks.
    Lightning divides by the number of batches and the strategy by the number of ranks; both are undone here.
    """
    undo = trainer.world_size * trainer.accumulate_grad_batches
    if is_deepspeed(trainer.strategy):  # divides by the number of batches once more
        undo *= trainer.accumulate_grad_batches
    return loss_sum * undo / step_tokens.clamp(min=1)


def whole_weights(model: RWKV, trainer: Trainer) -> dict[str, Tensor] | None:
    """The weights of a model that DeepSpeed trains, on rank 0; None on the others."""
    import deepspeed

    weights = {}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else nullcontext():
            if trainer.is_global_zero:
                weights[name] = p.detach().cpu().clone()
    return weights if trainer.is_global_zero else None
