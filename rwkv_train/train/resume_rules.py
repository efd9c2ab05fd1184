"""What a resume does with every setting of a run: the one table, and the same for people to read."""

TAKES = "takes"  # a new value is in force from the first resumed step on
REFUSES = "refuses"  # another value is an error
IGNORES = "does not care"  # another value changes nothing

RULES = {
    "name": (IGNORES, "with runs, says which run goes on"),
    "runs": (IGNORES, "with name, says which run goes on"),
    "seed": (REFUSES, "it decides the order of the documents"),
    "model.init": (IGNORES, "the weights are the checkpoint's; only sizes are read from it"),
    "model.architecture": (REFUSES, "the weights of the checkpoint have it"),
    "model.n_layer": (REFUSES, "the weights of the checkpoint have this size"),
    "model.n_embd": (REFUSES, "the weights of the checkpoint have this size"),
    "model.n_att": (REFUSES, "the weights of the checkpoint have this size"),
    "model.head_size": (REFUSES, "the weights of the checkpoint have this size"),
    "model.n_ffn": (REFUSES, "the weights of the checkpoint have this size"),
    "model.vocab_size": (REFUSES, "the weights of the checkpoint have this size"),
    "model.dropout": (TAKES, ""),
    "model.tune": (REFUSES, "it decides which weights the checkpoint has, and which of them the optimizer has seen"),
    "model.rank": (REFUSES, "the factors in the checkpoint have this size"),
    "model.ranks": (REFUSES, "the factors in the checkpoint have these sizes"),
    "model.base": (REFUSES, "the factors were trained beside matrices that were kept in this way"),
    "data.path": (REFUSES, "other text; the same text in another place is taken"),
    "data.val": (TAKES, "another text for validation is told; between a text of its own and a share, see val_share"),
    "data.val_share": (REFUSES, "it decides which documents are trained; it is 0 where data.val is given"),
    "data.val_lanes": (TAKES, ""),
    "data.lanes": (REFUSES, "lanes decide what a batch reads"),
    "data.chunk_len": (REFUSES, "chunk_len * horizon decides what a batch reads; with the same product it is taken"),
    "data.horizon": (REFUSES, "chunk_len * horizon decides what a batch reads; with the same product it is taken"),
    "data.tokenizer": (TAKES, "the run's tokenizer.json is written anew; a store names its own and needs none"),
    "optim.lr": (TAKES, ""),
    "optim.min_lr": (TAKES, ""),
    "optim.schedule": (TAKES, "as if it had been so from step 1 on"),
    "optim.warmup": (TAKES, "as if it had been so from step 1 on"),
    "optim.decay_share": (TAKES, ""),
    "optim.beta1": (TAKES, "the running means are kept"),
    "optim.beta2": (TAKES, "the running means are kept"),
    "optim.eps": (TAKES, ""),
    "optim.weight_decay": (TAKES, "refused with DeepSpeed between none and some: its state lies in other groups"),
    "optim.clip": (TAKES, ""),
    "optim.z_loss": (TAKES, ""),
    "train.steps": (TAKES, "the schedule follows the new total; fewer than are done are refused"),
    "train.epochs": (TAKES, "the schedule follows the new total; fewer than are done are refused"),
    "train.accumulate": (REFUSES, "it decides which batches make a step"),
    "train.precision": (TAKES, "weights are float32 either way; refused with DeepSpeed, which keeps others"),
    "train.checkpoint_blocks": (TAKES, "gradients are the same"),
    "train.cuda_graph": (TAKES, "gradients are the same"),
    "train.device": (TAKES, "dropout draws other numbers there"),
    "train.devices": (TAKES, "lanes are shared out anew, dropout draws other numbers; refused with DeepSpeed"),
    "train.nodes": (TAKES, "lanes are shared out anew, dropout draws other numbers; refused with DeepSpeed"),
    "train.strategy": (
        TAKES,
        "auto, ddp and fsdp read each other's checkpoints; to, from and within DeepSpeed refused",
    ),
    "train.val_every": (TAKES, ""),
    "train.save_every": (TAKES, ""),
    "train.save_async": (TAKES, ""),
    "train.keep": (TAKES, ""),
    "train.keep_best": (TAKES, ""),
    "train.max_skips": (TAKES, ""),
    "train.log_every": (TAKES, ""),
    "log.tensorboard": (TAKES, ""),
    "log.wandb": (TAKES, ""),
    "log.project": (TAKES, "in another project wandb begins a run of its own"),
    "samples.prompts": (TAKES, ""),
    "samples.tokens": (TAKES, ""),
    "samples.temperature": (TAKES, ""),
    "samples.top_p": (TAKES, ""),
}


def resume_table() -> list[str]:
    """The table as lines of Markdown."""
    lines = ["| setting | a resume | |", "|---|---|---|"]
    return lines + [f"| `{name}` | {kind} | {why} |" for name, (kind, why) in RULES.items()]
