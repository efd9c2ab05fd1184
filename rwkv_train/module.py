"""The LightningModule: lanes in, one loss a step, the detached state carried to the next step."""

from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from rwkv_train.bptt import chunked_loss
from rwkv_train.config import FitConfig
from rwkv_train.data.lanes import LaneBatches
from rwkv_train.evaluate import Score, Scorer
from rwkv_train.files import replace_file
from rwkv_train.models.common import RWKV
from rwkv_train.optim import make_optimizer
from rwkv_train.state import State


class OnlineTrainer(L.LightningModule):
    """Training step n reads horizon * chunk_len tokens of every lane and starts from where step n-1 stopped.

    The lane state is a plain attribute: as a buffer, DDP would overwrite every rank's with rank 0's.
    """

    def __init__(self, model: RWKV, config: FitConfig, train: LaneBatches, val: LaneBatches | None, byte_lengths=None):
        super().__init__()
        self.model, self.config = model, config
        self.train_batches, self.val_batches, self.byte_lengths = train, val, byte_lengths
        self.lane_state: State | None = None
        self.batches_done = 0
        self.scorer: Scorer | None = None
        self.last_score: Score | None = None
        self.grad_norm = torch.zeros(())
        self._resumed_rng: Tensor | None = None
        self.reset_sums()

    def setup(self, stage: str) -> None:
        """Take this rank's share of the lanes."""
        for batches in (self.train_batches, self.val_batches):
            if batches is not None:
                batches.take(self.global_rank, self.trainer.world_size)

    def reset_sums(self) -> None:
        """Start a new mean of the training loss: self.sums = nats and trained tokens of this rank."""
        self.sums = torch.zeros(2, dtype=torch.float64)

    def training_step(self, batch: dict[str, Tensor], _) -> Tensor:
        data = self.config.data
        loss, tokens, state = chunked_loss(
            self.model,
            batch["tokens"],
            batch["targets"],
            self.lane_state,
            batch["reset"],
            data.chunk_len,
            z_loss=self.config.optim.z_loss,
            recompute_blocks=self.config.train.recompute,
        )
        self.lane_state = state.detach()
        self.batches_done += 1
        self.sums = self.sums.to(loss.device) + torch.stack([loss.detach().double(), tokens.double()])
        # Lightning divides by `accumulate` and DDP by the number of ranks: what is left is the mean over
        # all trained tokens of the optimizer step, however they are spread over batches and ranks.
        share = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return loss * share / batch["step_tokens"].clamp(min=1)

    def configure_optimizers(self):
        optimizer, scheduler = make_optimizer(self.model, self.config.optim, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip, and keep the norm before it. (Lightning's own clipping refuses fused optimizers under bfloat16.)"""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.grad_norm)

    def train_dataloader(self) -> DataLoader:
        return _loader(self.train_batches, sampler=_From(self.batches_done, len(self.train_batches)))

    def val_dataloader(self) -> DataLoader | list:
        return [] if self.val_batches is None else _loader(self.val_batches)

    def on_train_start(self) -> None:
        if self._resumed_rng is not None:
            torch.set_rng_state(self._resumed_rng)

    def on_validation_epoch_start(self) -> None:
        self.scorer = Scorer(self.model, self.byte_lengths)

    def validation_step(self, batch: dict[str, Tensor], _) -> None:
        self.scorer.add(batch)

    def on_validation_epoch_end(self) -> None:
        self.last_score, self.scorer = self.scorer.score(self.add_over_ranks), None

    def add_over_ranks(self, x: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(x, reduce_op="sum")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Lane states and random state of all ranks go with the weights; only rank 0's dict is written."""
        state = None if self.lane_state is None else [self._gather(s) for s in self.lane_state]
        checkpoint["rwkv_train"] = {
            "batches_done": self.batches_done,
            "lane_state": state,
            "rng": self._gather(torch.get_rng_state()[None]),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved = checkpoint["rwkv_train"]
        self.batches_done = saved["batches_done"]
        if saved["lane_state"] is not None:
            rows = slice(self.train_batches.first, self.train_batches.first + self.train_batches.lanes)
            self.lane_state = State(*saved["lane_state"]).select(rows).to(self.device)
        self._resumed_rng = saved["rng"][min(self.global_rank, len(saved["rng"]) - 1)]

    def _gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks, in order, on the CPU."""
        return self.all_gather(x).flatten(0, 1).cpu() if self.trainer.world_size > 1 else x.cpu()


def _loader(batches: LaneBatches, **kwargs) -> DataLoader:
    """A loader with random numbers of its own: it draws some, and a validation must not change the dropout after it."""
    return DataLoader(batches, batch_size=None, generator=torch.Generator(), **kwargs)


class _From(Sampler):
    """Indices start, ..., total - 1. Its length is the whole run's: Lightning counts resumed batches as fetched."""

    def __init__(self, start: int, total: int):
        self.start, self.total = start, total

    def __iter__(self):
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a killed run never leaves half a checkpoint under its name."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: torch.save(checkpoint, temporary))
