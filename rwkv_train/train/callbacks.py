"""What happens between optimizer steps: signals, figures and validation, checkpoints. In this order."""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map

from rwkv_train.checkpoints.run_checkpoint import (
    FACTS,
    TRAINER,
    WEIGHTS,
    checkpoint_folder,
    commit,
    draft,
    is_best,
    prune,
)
from rwkv_train.checkpoints.weightfile import write_safetensors
from rwkv_train.config import FitConfig
from rwkv_train.evaluate import Score, perplexity
from rwkv_train.train.answers import Answers
from rwkv_train.train.module import OnlineTrainingModule
from rwkv_train.train.runlog import RunLog, peak_memory_mb
from rwkv_train.train.strategies import is_deepspeed, whole_weights

# And the exit codes that tell a shell of them. The last one comes when a terminal is closed; Windows has none.
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143} | ({signal.SIGHUP: 129} if hasattr(signal, "SIGHUP") else {})


class AtStart(L.Callback):
    """Does something on the first rank once a checkpoint, if there is one, has been read without an error."""

    def __init__(self, work: Callable[[], object]):
        self._work = work

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            self._work()


class BetweenSteps(L.Callback):
    """A callback that is called after every optimizer step, not after every batch: gradients would be lost."""

    def on_train_batch_end(self, trainer, module, outputs, batch, n):
        if (n + 1) % trainer.accumulate_grad_batches == 0:
            self.after_step(trainer, module)

    def after_step(self, trainer: L.Trainer, module: OnlineTrainingModule) -> None:
        raise NotImplementedError


class Stopper(BetweenSteps):
    """Ends the run, on all ranks at the same step, once a signal came to any of them.

    A second Ctrl-C interrupts at once. A signal that this process was started to ignore (by nohup, or by a shell in
    the background) stays ignored.
    """

    def __init__(self):
        self.signal: int | None = None
        self._heard = Answers()  # whether one came to any rank
        self._ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
        self._old = {}

    def on_train_start(self, trainer, module):
        for number in SIGNALS:
            handler = signal.SIG_IGN if number in self._ignored else self._on_signal
            self._old[number] = signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def after_step(self, trainer, module):
        heard = self.signal is not None
        if trainer.world_size > 1:
            mine = torch.full((), float(heard), device=module.device)
            self._heard.ask(trainer.strategy.reduce(mine, reduce_op="sum"))
            heard = any(answer.value for answer in self._heard.known())
        if heard:
            self.signal = self.signal or signal.SIGTERM  # it came to another rank
            trainer.should_stop = True

    def on_train_end(self, trainer, module):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def on_exception(self, trainer, module, exception):
        self.on_train_end(trainer, module)


class Monitor(BetweenSteps):
    """Speed, memory and losses to the terminal, metrics.jsonl and the loggers, every `log_every` steps; validation."""

    def __init__(self, config: FitConfig, run: Path):
        self.config, self.run = config, run
        self.scores: dict[int, Score] = {}  # by step
        self.started = time.monotonic()
        self.runlog: RunLog | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            self.runlog = RunLog(self.run / "metrics.jsonl", self.run.name, trainer.max_steps)
            self.runlog.start_at(trainer.global_step)
        if module.val_batches and trainer.global_step == 0:
            self._validate(trainer, module)
        self._window()

    def _window(self):
        """Begin a new stretch of measured steps."""
        self.steps, self.busy, self.waited, self.mark = 0, 0.0, 0.0, time.monotonic()

    def on_train_batch_start(self, trainer, module, batch, n):
        now = time.monotonic()
        self.waited += now - self.mark
        self.mark = now

    def on_train_batch_end(self, trainer, module, outputs, batch, n):
        self._busy_until_now()
        super().on_train_batch_end(trainer, module, outputs, batch, n)
        self.mark = time.monotonic()

    def _busy_until_now(self, device: torch.device | None = None):
        """device: what has to be done with its work first."""
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.monotonic()
        self.busy += now - self.mark
        self.mark = now

    def after_step(self, trainer, module):
        self.steps += 1
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        if self.runlog:
            self.runlog.step()
        if step % self.config.train.log_every == 0 or last:
            self._record(trainer, module)
            self._window()
        if module.val_batches and not trainer.should_stop and (step % self.config.train.val_every == 0 or last):
            self._busy_until_now(module.device)
            self._validate(trainer, module)

    def _record(self, trainer, module):
        module.count_skips(wait=True)
        nats, tokens = module.add_over_ranks(module.sums).tolist()
        module.reset_sums()
        self._busy_until_now(module.device)
        seconds = (self.busy + self.waited) / self.steps
        read = self.config.data.lanes * module.train_batches.width * trainer.accumulate_grad_batches
        loss = nats / tokens if tokens else math.nan  # no trained token in these steps, or none that was finite
        record = {
            "step": trainer.global_step,
            "tokens": trainer.global_step * read,
            "loss": loss,
            "perplexity": perplexity(loss),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(module.grad_norm),
            "skipped": module.skipped,
            "tokens_per_s": read / seconds,
            "memory_mb": peak_memory_mb(module.device),
            "data_wait": self.waited / (self.busy + self.waited),
            "eta_s": seconds * (trainer.max_steps - trainer.global_step),
            "seconds": self.elapsed,
        }
        if self.runlog:
            self.runlog.train(record)
            self._send(trainer, record)

    def _validate(self, trainer, module):
        step, score = trainer.global_step, module.validate()
        self.scores[step] = score
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
            for logger in trainer.loggers:
                if isinstance(logger, L.pytorch.loggers.WandbLogger):
                    log_by_position(logger, score, step)

    def _send(self, trainer, record):
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in record.items() if v is not None and k != "step"}, record["step"])

    def close(self):
        if self.runlog:
            self.runlog.close()


def log_by_position(logger, score: Score, step: int) -> None:
    """Loss by position in the document, as a plot in wandb."""
    import wandb

    table = wandb.Table(["position", "loss", "tokens"], [[row[0], row[2], row[3]] for row in score.by_position()])
    plot = wandb.plot.line(table, "position", "loss", title="validation loss by position in the document")
    logger.experiment.log({"val_by_position": plot, "trainer/global_step": step})


class Saver(BetweenSteps):
    """Checkpoints every so many steps, at the end, at validations among the best, and when the run is to stop."""

    def __init__(self, run: Path, config: FitConfig, monitor: Monitor, io: "HeldCheckpoint", facts: dict):
        """io: the trainer's, too. facts: what each checkpoint says of how it was made, as `resume.Resumed` reads it."""
        self.run, self.config, self.monitor, self.io, self.facts = run, config.train, monitor, io, facts
        self._worker, self._pending = ThreadPoolExecutor(1), None  # one at a time, in order

    def setup(self, trainer, module, stage):
        self.run = trainer.strategy.broadcast(self.run)  # the first rank made the folder and knows its name

    def after_step(self, trainer, module):
        step, train = trainer.global_step, self.config
        score = self.monitor.scores[step].loss if step in self.monitor.scores else None
        due = trainer.should_stop or step % train.save_every == 0 or step == trainer.max_steps
        best = trainer.is_global_zero and score is not None and is_best(self.run, score, train.keep_best)
        if due or (score is not None and any_rank(trainer, best)):
            self._save(trainer, module, step, score)

    def on_train_end(self, trainer, module):
        self._agree(trainer, self._finish)
        self._worker.shutdown()

    def _save(self, trainer, module, step: int, score: float | None):
        target = checkpoint_folder(self.run, step)
        self._agree(trainer, self._finish)
        self._agree(trainer, lambda: trainer.is_global_zero and _empty(draft(target)))
        self._agree(trainer, lambda: trainer.save_checkpoint(draft(target) / TRAINER))
        content = self.io.take()
        weights = whole_weights(module.model, trainer) if is_deepspeed(trainer.strategy) else None
        if self.config.save_async:
            content = tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, content)

        def write():
            if content is not None:
                torch.save(content, draft(target) / TRAINER)
            if weights is not None:
                write_safetensors(weights, draft(target) / WEIGHTS)
            (draft(target) / FACTS).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
            commit(target, step=step, val_loss=score)
            prune(self.run, self.config.keep, self.config.keep_best)

        if trainer.is_global_zero:
            self._pending = self._worker.submit(write)
        if not self.config.save_async:
            self._agree(trainer, self._finish)

    def _finish(self):
        """Wait for what is being written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _agree(self, trainer, work: Callable[[], object]):
        """Do something that may fail on one rank, and fail on all of them then instead of waiting for it."""
        error = None
        try:
            work()
        except (OSError, RuntimeError) as found:  # torch.save raises RuntimeError where a disk is full
            error = found
        if any_rank(trainer, error is not None):
            for folder in (self.run / "checkpoints").glob(".step=*.tmp"):
                shutil.rmtree(folder, ignore_errors=True)
            if error is None:
                raise SystemExit(1)  # the rank that failed says why
            raise OSError(
                f"step {trainer.global_step} could not be saved in {self.run / 'checkpoints'} ({error}); make room "
                "there or allow writing, and go on with --resume: the checkpoints before it are as they were"
            ) from error


class HeldCheckpoint(TorchCheckpointIO):
    """Keeps what Lightning would write, for `Saver` to write it."""

    def __init__(self):
        self._content = None

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        self._content = checkpoint

    def take(self) -> dict | None:
        """The checkpoint, once; None where the strategy has written it by itself, and on ranks that write none."""
        content, self._content = self._content, None
        return content


def any_rank(trainer: L.Trainer, flag: bool) -> bool:
    """Whether something is so on any rank."""
    return trainer.strategy.reduce_boolean_decision(flag, all=False)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
