"""The LightningModule: lanes in, one loss a step, the detached state carried on; and what watches and saves it."""

import signal
import time
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from rwkv_train.bptt import chunked_loss
from rwkv_train.config import FitConfig
from rwkv_train.data.lanes import LaneBatches
from rwkv_train.evaluate import Score, Scorer, perplexity
from rwkv_train.files import replace_file
from rwkv_train.models.common import RWKV
from rwkv_train.optim import make_optimizer
from rwkv_train.runlog import RunLog, peak_memory_mb
from rwkv_train.state import State

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # and the exit codes that tell a shell of them


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
        elif self.global_rank:  # every rank its own dropout
            torch.manual_seed(self.config.seed + self.global_rank)

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
            "order": self._order(),
            "batches_done": self.batches_done,
            "lane_state": state,
            "rng": self._gather(torch.get_rng_state()[None]),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved = checkpoint["rwkv_train"]
        for name, value in self._order().items():
            if value != (then := saved["order"][name]):
                raise ValueError(
                    f"{name} is {value}, and was {then} when the checkpoint was written, so its batches were others; "
                    "resume with the old value, or start a new run with model.init"
                )
        self.batches_done = saved["batches_done"]
        if saved["lane_state"] is not None:
            rows = slice(self.train_batches.first, self.train_batches.first + self.train_batches.lanes)
            self.lane_state = State(*saved["lane_state"]).select(rows).to(self.device)
        self._resumed_rng = saved["rng"][min(self.global_rank, len(saved["rng"]) - 1)]

    def _order(self) -> dict[str, int]:
        """The settings that decide what batch n is."""
        data, train = self.config.data, self.train_batches
        return {
            "seed": self.config.seed,
            "data.lanes": data.lanes,
            "data.chunk_len * data.horizon": train.width,
            "the number of training documents": len(train.documents),
            "the number of training tokens": train.documents.tokens,
        }

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


class Monitor(L.Callback):
    """Speed, memory and losses to the terminal, metrics.jsonl and the loggers, every `log_every` steps."""

    def __init__(self, config: FitConfig, run: Path):
        self.every, self.config, self.run = config.train.log_every, config, run
        self.scores, self.validated_at = [], None
        self.started = time.monotonic()
        self.runlog: RunLog | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def setup(self, trainer, module, stage):
        if trainer.is_global_zero and self.runlog is None:
            self.runlog = RunLog(self.run / "metrics.jsonl", self.run.name, trainer.max_steps)

    def on_train_start(self, trainer, module):
        if self.runlog:
            self.runlog.start_at(trainer.global_step)
        self._window()

    def _window(self):
        """Begin a new stretch of measured steps."""
        self.steps, self.busy, self.waited, self.mark = 0, 0.0, 0.0, time.monotonic()

    def on_train_batch_start(self, trainer, module, batch, n):
        now = time.monotonic()
        self.waited += now - self.mark
        self.mark = now

    def on_train_batch_end(self, trainer, module, outputs, batch, n):
        now = time.monotonic()
        self.busy += now - self.mark
        self.mark = now
        if (n + 1) % trainer.accumulate_grad_batches:
            return
        self.steps += 1
        if self.runlog:
            self.runlog.step()
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._record(trainer, module)
            self._window()

    def _record(self, trainer, module):
        nats, tokens = module.add_over_ranks(module.sums).tolist()
        module.reset_sums()
        seconds = (self.busy + self.waited) / self.steps
        read = self.config.data.lanes * module.train_batches.width * trainer.accumulate_grad_batches
        loss = nats / max(tokens, 1)
        record = {
            "step": trainer.global_step,
            "tokens": trainer.global_step * read,
            "loss": loss,
            "perplexity": perplexity(loss),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(module.grad_norm),
            "tokens_per_s": read / seconds,
            "memory_mb": peak_memory_mb(module.device),
            "data_wait": self.waited / (self.busy + self.waited),
            "eta_s": seconds * (trainer.max_steps - trainer.global_step),
            "seconds": self.elapsed,
        }
        if self.runlog:
            self.runlog.train(record)
            self._send(trainer, record)

    def on_validation_end(self, trainer, module):
        score, step = module.last_score, trainer.global_step
        self.scores.append(score)
        self.validated_at = step
        record = {
            "step": step,
            "val_loss": score.loss,
            "val_perplexity": score.perplexity,
            "val_bits_per_byte": score.bits_per_byte,
            "val_tokens": score.tokens,
        }
        if self.runlog:
            self.runlog.validation(record | {"val_by_position": score.by_position()})
            self._send(trainer, record)
        self.mark = time.monotonic()

    def _send(self, trainer, record):
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in record.items() if v is not None and k != "step"}, record["step"])

    def close(self):
        if self.runlog:
            self.runlog.close()


class Saver(L.Callback):
    """Checkpoints every so many steps, at the end, and when a signal asks the run to stop.

    Signals set a flag; the run stops between two optimizer steps, all ranks at the same one. A second Ctrl-C
    interrupts at once.
    """

    def __init__(self, folder: Path, every: int, keep: int):
        self.folder, self.every, self.keep = folder, every, keep
        self.signal: int | None = None
        self._old = {}

    def on_train_start(self, trainer, module):
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(self, trainer, module, outputs, batch, n):
        if (n + 1) % trainer.accumulate_grad_batches:
            return  # gradients of a half-accumulated step would be lost
        step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if stop and self.signal is None:
            self.signal = signal.SIGTERM  # another rank was asked to stop
        if stop or step % self.every == 0 or step == trainer.max_steps:
            trainer.save_checkpoint(self.folder / f"step={step:08d}.ckpt")
            if trainer.is_global_zero:
                for old in sorted(self.folder.glob("step=*.ckpt"))[: -self.keep]:
                    old.unlink()
        trainer.should_stop = trainer.should_stop or stop

    def on_train_end(self, trainer, module):
        for number, handler in self._old.items():
            signal.signal(number, handler)
