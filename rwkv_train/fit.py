"""`train.py fit`: settings -> data, model, run folder -> Lightning's trainer -> samples and what to do next."""

import logging
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
import torch

from rwkv_train.checkpoint import load_model, newest_checkpoint
from rwkv_train.config import DataConfig, FitConfig, LogConfig, ModelConfig
from rwkv_train.data.lanes import Documents, LaneBatches, split
from rwkv_train.data.store import Store
from rwkv_train.evaluate import byte_lengths
from rwkv_train.generate import Sampling, generate_text
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.module import SIGNALS, AtomicCheckpointIO, Monitor, OnlineTrainer, Saver
from rwkv_train.runlog import duration, new_run, write_config
from rwkv_train.tokenizer import Tokenizer, load_tokenizer


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
        write_config(run / "config.yaml", asdict(replace(config, name=run.name)))
        if tokenizer:
            tokenizer.save(run / "tokenizer.json")
    else:
        run = Path(config.runs) / config.name  # only rank 0 writes
    module = OnlineTrainer(model, config, train, val, byte_lengths(tokenizer, model.config.vocab_size))
    monitor = Monitor(config, run)
    saver = Saver(run / "checkpoints", config.train.save_every, config.train.keep)
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
