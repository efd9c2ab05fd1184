"""`train.py fit`: settings -> data, model, run folder -> Lightning's trainer -> samples and what to do next."""

import logging
import os
import signal
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch

from rwkv_train.checkpoint import load_model, newest_checkpoint
from rwkv_train.config import DataConfig, FitConfig, LogConfig, ModelConfig
from rwkv_train.data.lanes import Documents, LaneBatches, split
from rwkv_train.data.store import Store
from rwkv_train.evaluate import byte_lengths, perplexity
from rwkv_train.generate import Sampling, generate_text
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.module import AtomicCheckpointIO, OnlineTrainer
from rwkv_train.runlog import RunLog, duration, new_run, peak_memory_mb, write_config
from rwkv_train.tokenizer import Tokenizer, load_tokenizer

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # and the exit codes that tell a shell of them


def fit(config: FitConfig, resume: str | None = None) -> int:
    """Train as configured; resume: "newest" or the path of a checkpoint. Returns the exit code."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))  # set by the launcher, not by people
    _check_machine(config)
    checkpoint = _checkpoint(config, resume) if resume else None
    store = Store.open(config.data.path)
    tokenizer = store.tokenizer() or (load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None)
    torch.manual_seed(config.seed)
    model = make_model(config.model, tokenizer)
    train, val = make_batches(config, store, model)
    if checkpoint:
        run = checkpoint.parent.parent
    elif rank == 0:
        run = new_run(config.runs, config.name)
        write_config(run / "config.yaml", asdict(config))
        if tokenizer:
            tokenizer.save(run / "tokenizer.json")
    else:
        run = Path(config.runs) / config.name  # only rank 0 writes
    module = OnlineTrainer(model, config, train, val, byte_lengths(tokenizer, model.config.vocab_size))
    monitor, saver = (
        Monitor(config, run),
        Saver(run / "checkpoints", config.train.save_every, config.train.keep),
    )
    trainer = make_trainer(config, len(train) // config.train.accumulate, run, [monitor, saver])
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{run}: {parameters / 1e6:.1f}M parameters, {train.documents.tokens:,} tokens to train on, "
            f"{trainer.max_steps} steps of {config.data.lanes} x {train.width} tokens"
            + (f" x {config.train.accumulate}" if config.train.accumulate > 1 else "")
        )
    if val and not checkpoint:
        trainer.validate(module, verbose=False)
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    stopped = saver.signal
    if val and not stopped and monitor.validated_at != trainer.global_step:
        trainer.validate(module, verbose=False)
    monitor.close()
    if rank == 0:
        _farewell(config, run, trainer.global_step, monitor, model, tokenizer, stopped)
    return SIGNALS[stopped] if stopped else 0


def make_model(config: ModelConfig, tokenizer: Tokenizer | None) -> RWKV4:
    """A fresh model or the checkpoint `init`, in float32, ready to be trained."""
    if config.init:
        model = load_model(config.init, dtype=torch.float32)
    else:
        vocab_size = config.vocab_size or (tokenizer.vocab_size if tokenizer else None)
        if vocab_size is None:
            raise ValueError("the data names no tokenizer: give model.vocab_size or data.tokenizer")
        sizes = {k: v for k, v in asdict(config).items() if k in ("n_layer", "n_embd", "n_att", "n_ffn") and v}
        model = RWKV4(RWKV4Config(vocab_size, **sizes)).init_weights()
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the data's tokenizer ({tokenizer.name}) has {tokenizer.vocab_size} tokens and the model only "
            f"{model.config.vocab_size}; prepare the text with the model's own tokenizer"
        )
    for block in model.blocks:
        block.dropout = config.dropout
    return model.train()


def make_batches(config: FitConfig, store: Store, model: RWKV4) -> tuple[LaneBatches, LaneBatches | None]:
    """Training and validation batches for all lanes; `OnlineTrainer.setup` takes each rank's rows."""
    data = config.data
    train, val = split(store, 0 if data.val else data.val_share)
    if len(train) < data.lanes:
        cut = train.cut(-(-train.tokens // data.lanes))
        print(
            f"{store.path}: fewer documents ({len(train)}) than lanes ({data.lanes}), so they are cut into "
            f"{len(cut)} pieces; data.lanes={len(train)} would read them whole"
        )
        train = cut
    width = data.chunk_len * data.horizon
    if config.train.steps is None:
        steps = max(1, round(config.train.epochs * train.tokens / (width * data.lanes * config.train.accumulate)))
    else:
        steps = config.train.steps
    batches = LaneBatches(
        store,
        train,
        tokens_per_row=width,
        lanes=data.lanes,
        seed=config.seed,
        accumulate=config.train.accumulate,
        steps=steps * config.train.accumulate,
        vocab_size=model.config.vocab_size,
    )
    return batches, validation_batches(data, store, val, model, config.train.devices)


def validation_batches(
    data: DataConfig, store: Store, held_out: Documents, model: RWKV4, devices: int = 1
) -> LaneBatches | None:
    """One pass over data.val, or over what is held out of data.path; None if that is nothing."""
    if data.val:
        store = Store.open(data.val)
        held_out = split(store, 0)[0]
    if not len(held_out):
        return None
    lanes = min(data.val_lanes, len(held_out))
    lanes = -(-lanes // devices) * devices
    return LaneBatches(store, held_out, tokens_per_row=data.chunk_len, lanes=lanes, vocab_size=model.config.vocab_size)


def make_trainer(config: FitConfig, steps: int, run: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's trainer for one endless epoch of `steps` optimizer steps."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*torch.jit.*|.*isinstance.*LeafSpec.*")
    train = config.train
    return L.Trainer(
        accelerator={"cuda": "gpu"}.get(train.device, train.device),
        devices=train.devices,
        strategy="ddp" if train.devices > 1 else "auto",
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[train.precision],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=train.accumulate,
        gradient_clip_val=config.optim.clip or None,
        val_check_interval=train.val_every * train.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=_loggers(config.log, run),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
    )


def _loggers(log: LogConfig, run: Path) -> list:
    loggers = []
    if log.tensorboard:
        loggers.append(L.pytorch.loggers.TensorBoardLogger(run, name="", version="tensorboard"))
    if log.wandb != "off":
        loggers.append(
            L.pytorch.loggers.WandbLogger(
                name=run.name, project=log.project, save_dir=run, offline=log.wandb == "offline"
            )
        )
    return loggers


def _check_machine(config: FitConfig) -> None:
    """What cannot work here is said before anything is loaded."""
    from importlib.util import find_spec

    for wanted, package in ((config.log.tensorboard, "tensorboard"), (config.log.wandb != "off", "wandb")):
        if wanted and find_spec(package) is None:
            raise ValueError(f"log.{package} needs a package: pip install '{package}', or 'rwkv_train[{package}]'")
    if config.log.wandb == "online":
        import wandb

        if not wandb.api.api_key:
            raise ValueError("log.wandb: online needs a key: run `wandb login` first, or use log.wandb: offline")
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device: cuda, but torch sees no GPU; use train.device: cpu")


def _checkpoint(config: FitConfig, resume: str) -> Path:
    run = Path(config.runs) / config.name
    found = newest_checkpoint(run) if resume == "newest" else Path(resume)
    if found is None or not found.is_file():
        raise ValueError(f"no checkpoint to resume from in {run if resume == 'newest' else resume}")
    return found


def _farewell(config, run, step, monitor, model, tokenizer, stopped) -> None:
    """What happened and what to do next."""
    print(f"\n{'Stopped' if stopped else 'Done'} at step {step} after {duration(monitor.elapsed)}.")
    if monitor.scores:
        first, last = monitor.scores[0], monitor.scores[-1]
        bits = f", {last.bits_per_byte:.3f} bits per byte" if last.bits_per_byte else ""
        before = f"{first.loss:.3f} -> " if len(monitor.scores) > 1 else ""
        print(f"Validation loss {before}{last.loss:.3f} (perplexity {last.perplexity:.1f}{bits}).")
    if stopped:
        print(f"Saved. Continue with:\n  python train.py fit --config {run}/config.yaml --resume")
        return
    if tokenizer:
        model.eval()
        sampling = Sampling(config.samples.temperature, config.samples.top_p)
        for i, prompt in enumerate(config.samples.prompts):
            text = "".join(generate_text(model, tokenizer, prompt, sampling, config.samples.tokens, seed=i))
            print(f"\nSample {i + 1}: {prompt}{text.rstrip()}")
    print(f"\nThe run is in {run}: config.yaml, metrics.jsonl, checkpoints/.\nNext:")
    print(f'  python train.py generate --model {run} --prompt "Once"')
    print(f"  python train.py validate --model {run}\n  python train.py export --model {run} --out model.pth")


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
            self.runlog = RunLog(self.run / "metrics.jsonl", self.run.name, trainer.max_steps, trainer.global_step)

    def on_train_start(self, trainer, module):
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
