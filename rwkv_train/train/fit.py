"""`train.py fit`: settings -> data, model, run folder -> Lightning's trainer -> samples and what to do next."""

import json
import logging
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
import torch

from rwkv_train.checkpoints.modelfile import load_model
from rwkv_train.checkpoints.names import pinned
from rwkv_train.checkpoints.opener import format_of_run, open_model, told
from rwkv_train.checkpoints.run_checkpoint import TRAINER
from rwkv_train.config import FitConfig, LogConfig, ModelConfig
from rwkv_train.data.batches import make_batches
from rwkv_train.data.store import Store
from rwkv_train.data.text_format import TextFormat
from rwkv_train.evaluate import byte_lengths
from rwkv_train.files import replace_file
from rwkv_train.generate import Sampling, generate_text
from rwkv_train.models.adapters import tune
from rwkv_train.models.base import RWKV
from rwkv_train.models.fresh import fresh_sizes
from rwkv_train.models.rwkv4 import RWKV4
from rwkv_train.models.rwkv7 import RWKV7
from rwkv_train.program import command
from rwkv_train.run_config import whole_paths
from rwkv_train.tokenizer import Tokenizer
from rwkv_train.train.callbacks import SIGNALS, AtStart, HeldCheckpoint, Monitor, Saver, Stopper
from rwkv_train.train.graphed import refuse_graph
from rwkv_train.train.module import OnlineTrainingModule
from rwkv_train.train.output import lasting_output
from rwkv_train.train.resume import compare, find_run, open_run, texts_of
from rwkv_train.train.runlog import duration, new_run, only_writer, write_config
from rwkv_train.train.strategies import make_strategy


def fit(config: FitConfig, resume: str | None = None) -> int:
    """Train as configured; resume: "newest" or the path of a checkpoint. Returns the exit code."""
    _check_machine(config)
    with lasting_output(), ExitStack() as writing:
        then = None
        if resume:
            run = find_run(config, resume)
            writing.enter_context(_only_writer(run))
            then = open_run(run, resume)
        if config.model.init:
            init = pinned(config.model.init, then and then.settings.get("model.init"))
            config = replace(config, model=replace(config.model, init=init))
        store = Store.open(config.data.path)
        form, notes = format_of_run(config.model.init, store, config.data.tokenizer)
        tokenizer = form.tokenizer
        torch.manual_seed(config.seed)
        model = make_model(config.model, tokenizer)
        refuse_graph(config, model)
        train, val = make_batches(config, store, model.config.vocab_size)
        steps, texts = len(train) // config.train.accumulate, texts_of(config, store)
        changes = compare(then, config, model.config, steps, texts) if then else []
        if not then:
            run = new_run(config.runs, config.name) if _rank() == 0 else Path(config.runs) / config.name
            writing.enter_context(_only_writer(run))
        if _rank() == 0:
            for note in notes:
                told(note)
            parameters = sum(p.numel() for p in model.parameters())
            print(
                f"{run}: {parameters / 1e6:.1f}M parameters, {train.documents.tokens:,} tokens to train on, "
                f"{steps} steps of {config.data.lanes} x {train.width} tokens"
                + (f" x {config.train.accumulate}" if config.train.accumulate > 1 else "")
            )
            print("".join(line + "\n" for line in changes), end="")
        bytes_of, layout = byte_lengths(tokenizer, model.config.vocab_size), then.layout if then else {}
        module = OnlineTrainingModule(model, config, train, val, bytes_of, layout)
        return _train(replace(config, name=run.name), run, module, form, texts, then)


def _train(config: FitConfig, run: Path, module: OnlineTrainingModule, form: TextFormat, texts: dict, then) -> int:
    """The run itself, which is nobody else's now. Returns the exit code."""

    def record():
        write_config(run / "config.yaml", asdict(config))
        form.save(run)

    if not then and _rank() == 0:
        record()
    stopper, monitor, io = Stopper(), Monitor(config, run), HeldCheckpoint()
    saver = Saver(run, config, monitor, io, {"settings": whole_paths(asdict(config)), "texts": texts})
    steps = len(module.train_batches) // config.train.accumulate
    trainer = make_trainer(config, steps, run, [AtStart(record), stopper, monitor, saver], io)
    checkpoint = then.checkpoint / TRAINER if then and then.checkpoint else None
    with _closing(trainer):
        try:
            trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        finally:
            monitor.close()
        if _rank() == 0:
            _farewell(config, run, trainer, monitor, form.tokenizer, stopper.signal)
    return SIGNALS[stopper.signal] if stopper.signal else 0


def _rank() -> int:
    """This process's, as the launcher says, not people."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


def _only_writer(run: Path):
    """All ranks of a run are one writer."""
    return only_writer(run) if _rank() == 0 else nullcontext()


def make_model(config: ModelConfig, tokenizer: Tokenizer | None) -> RWKV:
    """A fresh model or the checkpoint `init`, in float32, ready to be trained."""
    if config.init:
        model = load_model(config.init, dtype=torch.float32)
    else:
        vocab_size = config.vocab_size or (tokenizer.vocab_size if tokenizer else None)
        if vocab_size is None:
            raise ValueError("the data names no tokenizer: give model.vocab_size or data.tokenizer")
        sizes = fresh_sizes(config, vocab_size)
        model = (RWKV7 if config.architecture == "rwkv7" else RWKV4)(sizes).init_weights()
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the data's tokenizer ({tokenizer.name}) has {tokenizer.vocab_size} tokens and the model only "
            f"{model.config.vocab_size}; prepare the text with the model's own tokenizer"
        )
    for block in model.blocks:
        block.dropout = config.dropout
    if config.tune != "all":
        tune(model, config.tune, config.rank or 16, config.base, config.ranks)
    return model.train()


def make_trainer(
    config: FitConfig, steps: int, run: Path, callbacks: list[L.Callback], io: HeldCheckpoint
) -> L.Trainer:
    """Lightning's trainer for one endless epoch of `steps` optimizer steps. io: takes what it would write itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*torch.jit.*|.*isinstance.*LeafSpec.*")
    train = config.train
    return L.Trainer(
        accelerator={"cuda": "gpu"}.get(train.device, train.device),
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=make_strategy(train),
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[train.precision],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=train.accumulate,
        gradient_clip_val=config.optim.clip or None,
        use_distributed_sampler=False,
        logger=_loggers(config.log, run),
        callbacks=callbacks,
        plugins=[io],
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
                name=run.name,
                project=log.project,
                save_dir=run,
                offline=log.wandb == "offline",
                id=_wandb_id(run),
                resume="allow",
            )
        )
    return loggers


@contextmanager
def _closing(trainer: L.Trainer) -> Iterator[None]:
    """End what outlives a run otherwise: wandb's run, which the next one would write into, and the ranks' threads."""
    try:
        yield
    finally:
        if any(isinstance(logger, L.pytorch.loggers.WandbLogger) for logger in trainer.loggers):
            import wandb

            wandb.finish()  # not the logger's experiment: asking for that begins one where the run failed before
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _wandb_id(run: Path) -> str:
    """The same for all tries of a run, so that a resumed one goes on in wandb too."""
    path = run / "wandb-id"
    if not path.is_file():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _check_machine(config: FitConfig) -> None:
    """What cannot work here is said before anything is loaded."""
    from importlib.util import find_spec

    by_deepspeed = config.train.strategy.startswith("deepspeed")
    for wanted, section, package in (
        (config.log.tensorboard, "log.tensorboard", "tensorboard"),
        (config.log.wandb != "off", "log.wandb", "wandb"),
        (by_deepspeed, "train.strategy", "deepspeed"),
    ):
        if wanted and find_spec(package) is None:
            raise ValueError(f"{section} needs a package: pip install '{package}', or 'rwkv_train[{package}]'")
    if config.log.wandb == "online":
        import wandb

        if not wandb.api.api_key:
            raise ValueError("log.wandb: online needs a key: run `wandb login` first, or use log.wandb: offline")
    if by_deepspeed and (config.train.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError(f"train.strategy: {config.train.strategy} needs a GPU; on a CPU use ddp or fsdp")
    if config.train.cuda_graph and not torch.cuda.is_available():
        raise ValueError("train.cuda_graph needs a GPU, and torch sees none; drop it")
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device: cuda, but torch sees no GPU; use train.device: cpu")


def _farewell(config, run, trainer, monitor, tokenizer, stopped) -> None:
    """What happened and what to do next."""
    print(f"\n{'Stopped' if stopped else 'Done'} at step {trainer.global_step} after {duration(monitor.elapsed)}.")
    if monitor.scores:
        scores = [*monitor.scores.values()]
        bits = f", {scores[-1].bits_per_byte:.3f} bits per byte" if scores[-1].bits_per_byte else ""
        before = f"{scores[0].loss:.3f} -> " if len(scores) > 1 else ""
        print(f"Validation loss {before}{scores[-1].loss:.3f} (perplexity {scores[-1].perplexity:.1f}{bits}).")
    if stopped:
        print(f"Saved. Continue with:\n  {command('fit', '--config', run / 'config.yaml', '--resume')}")
        return
    if tokenizer:
        _write_samples(config, run, trainer)
    print(f"\nThe run is in {run}: config.yaml, metrics.jsonl, checkpoints/.\nNext:")
    print(f"  {command('generate', '--model', run, '--prompt', 'Once')}")
    print(f"  {command('validate', '--model', run)}\n  {command('report', run)}")
    print(f"  {command('export', '--model', run, '--out', 'model.pth')}")


def _write_samples(config: FitConfig, run: Path, trainer: L.Trainer) -> None:
    """Continue the prompts of the settings: to the terminal, RUN/samples.jsonl and wandb."""
    (model, tokenizer, _), settings = open_model(run, dtype=torch.float32, for_chats=False), config.samples
    sampling, samples = Sampling(settings.temperature, settings.top_p), []
    for i, prompt in enumerate(settings.prompts):
        text = "".join(generate_text(model, tokenizer, prompt, sampling, settings.tokens, seed=i))
        samples.append({"prompt": prompt, "text": text})
        print(f"\nSample {i + 1}: {prompt}{text.rstrip()}")
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    replace_file(run / "samples.jsonl", lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    for logger in trainer.loggers:
        if isinstance(logger, L.pytorch.loggers.WandbLogger):
            logger.log_text("samples", ["prompt", "text"], [[*sample.values()] for sample in samples])
