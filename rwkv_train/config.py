"""Settings of a training run: typed, read from YAML and dotted flags, checked before anything heavy is loaded."""

import re
from dataclasses import dataclass, field
from typing import Literal

Strategy = Literal[
    "auto",
    "ddp",
    "fsdp",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "deepspeed_stage_1_offload",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3_offload",
]

Thinking = Literal["off", "fake", "on", "normal", "short", "long"]  # how a thought is asked for; see data/templates.py

RENAMED = {"train.recompute": "train.checkpoint_blocks"}  # old names, still read in files and as flags


def renamed(settings: dict) -> dict:
    """Nested settings with the names of today. ValueError where a setting is given under both its names."""
    for old, new in RENAMED.items():
        *path, last = old.split(".")
        section = settings
        for name in path:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            now = new.rpartition(".")[2]
            if now in section:
                raise ValueError(f"{old} is the old name of {new}, and both are given; drop {old}")
            section[now] = section.pop(last)
    return settings


@dataclass
class ModelConfig:
    """The model."""

    init: str | None = None
    """checkpoint to start from (.pth, .safetensors, Hugging Face directory, runs/NAME or hf:OWNER/REPO/FILE); none
    starts fresh"""

    architecture: Literal["rwkv4", "rwkv7"] | None = None
    """generation of a fresh model, rwkv4 or rwkv7; rwkv4 if not given"""

    n_layer: int | None = None
    """blocks of a fresh model"""

    n_embd: int | None = None
    """channels of a fresh model"""

    n_att: int | None = None
    """attention channels of a fresh RWKV-4; n_embd if not given"""

    head_size: int | None = None
    """channels of a head of a fresh RWKV-7, a divisor of n_embd; 64 if not given"""

    n_ffn: int | None = None
    """hidden channels of the channel mix of a fresh model; 4 * n_embd if not given"""

    vocab_size: int | None = None
    """vocabulary of a fresh model; that of the data's tokenizer if not given"""

    dropout: float = 0.0
    """share of each block's output that is dropped in training"""

    tune: Literal["all", "lora", "pissa", "miss", "state"] = "all"
    """what of init is trained: all of it; lora, low-rank factors beside the blocks' matrices; pissa, the same, which
    begin as their principal components; miss, one small matrix beside each, repeated along its inputs; state, only the
    state in which documents begin"""

    rank: int | None = None
    """of the factors of tune lora, pissa and miss; 16 if not given"""

    ranks: list[str] = field(default_factory=list)
    """other ranks for some matrices, as PART=RANK by a part of their names (blocks.0.att.key): [att=8, blocks.0-5=4];
    the first that fits counts, and 0 leaves a matrix as it is"""

    base: Literal["float", "int8", "nf4"] = "float"
    """how the matrices beside the factors are kept: float; int8, a byte a number; nf4, half a byte"""

    def __post_init__(self):
        if self.tune != "all" and not self.init:
            raise ValueError(f"model.tune: {self.tune} needs model.init: a fresh model has to be trained as a whole")
        self._check_factors()
        sizes = ("n_layer", "n_embd", "n_att", "head_size", "n_ffn", "vocab_size")
        given = [name for name in ("architecture", *sizes) if getattr(self, name) is not None]
        if self.init and given:
            raise ValueError(
                f"model.init ({self.init}) and model.{given[0]} contradict each other: the checkpoint has its own "
                "sizes; drop one of them"
            )
        for name in given:
            if name in sizes:
                _at_least(1, "model", self, name)
        other = "head_size" if self.architecture in (None, "rwkv4") else "n_att"
        if other in given:
            named = "rwkv7 alone has heads" if other == "head_size" else "an rwkv7's attention is n_embd wide"
            raise ValueError(f"model.architecture and model.{other} contradict each other: {named}; drop one of them")
        if not self.init and not (self.n_layer and self.n_embd):
            raise ValueError("give model.init to start from a checkpoint, or model.n_layer and model.n_embd")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be at least 0 and below 1, found {self.dropout}")

    @property
    def factors(self) -> bool:
        """Whether factors beside the matrices are trained."""
        return self.tune in ("lora", "pissa", "miss")

    def _check_factors(self) -> None:
        for name, given in (("rank", self.rank is not None), ("ranks", self.ranks)):
            if given and not self.factors:
                raise ValueError(f"model.{name} is that of model.tune: lora, pissa or miss; drop it")
        if self.base != "float" and not self.factors:
            kinds = "model.tune: lora, pissa or miss"
            raise ValueError(f"model.base: {self.base} is for {kinds}; what is trained has to be float")
        if self.rank is not None:
            _at_least(1, "model", self, "rank")
        for entry in self.ranks:
            if not re.fullmatch(r"[\w.-]+=\d+", entry):
                raise ValueError(f"model.ranks takes entries as att=8 or blocks.0-5=4, found {entry!r}")


@dataclass
class DataConfig:
    """The text."""

    path: str = ""
    """token store made by `prepare`, or the prefix of existing RWKV .bin/.idx files"""

    val: str | None = None
    """a second store to validate on; without it a share of path is held out"""

    val_share: float = 0.02
    """share of the trained tokens held out for validation when val is not given, in whole documents where that comes
    near it; 0 does not validate"""

    val_lanes: int = 8
    """rows of a validation batch"""

    lanes: int = 8
    """rows of a training batch, over all devices; each reads its own endless stream of documents"""

    chunk_len: int = 512
    """tokens of a row whose activations are in memory at once"""

    horizon: int = 1
    """chunks a gradient flows back through; a step reads horizon * chunk_len tokens of every lane"""

    tokenizer: str | None = None
    """world, bytes or a tokenizer JSON; only for .bin/.idx files, which do not name theirs"""

    def __post_init__(self):
        for name in ("lanes", "val_lanes", "chunk_len", "horizon"):
            _at_least(1, "data", self, name)
        if not 0 <= self.val_share < 1:
            raise ValueError(f"data.val_share must be at least 0 and below 1, found {self.val_share}")


@dataclass
class OptimConfig:
    """The optimiser and its schedule."""

    lr: float = 6e-4
    """peak learning rate; about 6e-4 from scratch (12 x 768), 1e-5 for fine-tuning"""

    min_lr: float | None = None
    """learning rate at the end of the schedule; a tenth of lr if not given"""

    schedule: Literal["constant", "linear", "exponential", "cosine", "wsd"] = "cosine"
    """how lr falls to min_lr; wsd stays at lr and falls over the last decay_share of the steps"""

    warmup: int = 10
    """optimizer steps over which the rate rises to lr"""

    decay_share: float = 0.2
    """share of the steps over which wsd falls"""

    beta1: float = 0.9
    """decay of the gradient's running mean"""

    beta2: float = 0.99
    """decay of the squared gradient's running mean"""

    eps: float | None = None
    """added to the root of the squared gradient; 1e-8 for RWKV-4 and 1e-18 for RWKV-7 if not given"""

    weight_decay: float = 0.0
    """pull of matrices towards 0, times the learning rate; vectors are never decayed"""

    clip: float = 1.0
    """largest norm of the gradient; 0 does not clip"""

    z_loss: float = 1e-4
    """pull on each row's largest logit (RWKV-LM's L2Wrap is 1e-4); 0 is off"""

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be above 0, found {self.lr}")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.min_lr ({self.min_lr}) must lie between 0 and optim.lr ({self.lr})")
        if self.schedule == "constant" and self.min_lr not in (None, self.lr):
            raise ValueError("optim.schedule: constant and optim.min_lr contradict each other; drop one of them")
        if self.schedule == "exponential" and self.min_lr == 0:
            raise ValueError("optim.schedule: exponential never reaches optim.min_lr: 0; set it above 0")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"optim.decay_share must be above 0 and at most 1, found {self.decay_share}")
        for name in ("warmup", "weight_decay", "clip", "z_loss"):
            _at_least(0, "optim", self, name)


@dataclass
class TrainConfig:
    """The run."""

    steps: int | None = None
    """optimizer steps; give this or epochs"""

    epochs: float | None = None
    """times the training text is read; give this or steps"""

    accumulate: int = 1
    """batches whose gradients make one optimizer step"""

    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 for matrix products in bfloat16 with float32 weights"""

    checkpoint_blocks: bool | None = None
    """keep no activations inside blocks and run their forward again in the backward: less memory, slower; if not given,
    where model.tune leaves the weights as they are"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes a GPU if there is one"""

    devices: int = 1
    """number of devices of a machine, each with its share of the lanes"""

    nodes: int = 1
    """number of machines; start each with torchrun (see configs/multinode.yaml)"""

    strategy: Strategy = "auto"
    """how devices share the work: ddp, each holds the whole model; fsdp, weights in pieces; DeepSpeed's ZeRO with
    optimizer (1), gradients (2), weights (3) in pieces, offload with the optimizer on the CPU; auto is ddp"""

    cuda_graph: bool = False
    """record what a batch launches as a CUDA graph and replay it, which spares a small model the time of its launches;
    for one GPU, without dropout, not with model.tune: state"""

    val_every: int = 200
    """optimizer steps between validations"""

    save_every: int = 500
    """optimizer steps between checkpoints"""

    save_async: bool = False
    """write checkpoints while training goes on, from a copy in memory; not with DeepSpeed"""

    keep: int = 2
    """newest checkpoints that are kept"""

    keep_best: int = 0
    """checkpoints of the validations with the lowest loss that are kept besides"""

    max_skips: int = 10
    """steps in a row whose loss or gradient is no finite number, after which the run gives up"""

    log_every: int = 10
    """optimizer steps between lines of metrics.jsonl"""

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            hint = "" if self.steps is None else "; leave one out, or set it to null where a file gives it"
            raise ValueError(f"give exactly one of train.steps and train.epochs, found {found}{hint}")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"train.epochs must be above 0, found {self.epochs}")
        for name in ("accumulate", "devices", "nodes", "val_every", "save_every", "keep", "max_skips", "log_every"):
            _at_least(1, "train", self, name)
        _at_least(0, "train", self, "keep_best")
        if self.save_async and self.strategy.startswith("deepspeed"):
            raise ValueError("train.save_async and train.strategy: deepspeed contradict each other; drop one of them")
        if self.steps is not None:
            _at_least(1, "train", self, "steps")


@dataclass
class LogConfig:
    """Where metrics go besides the terminal and metrics.jsonl. Nothing leaves the machine unless wandb is online."""

    tensorboard: bool = False
    """also write TensorBoard files into the run's folder"""

    wandb: Literal["off", "offline", "online"] = "off"
    """also write to wandb; offline keeps everything in the run's folder, online needs WANDB_API_KEY"""

    project: str = "rwkv_train"
    """wandb project"""


@dataclass
class SampleConfig:
    """Texts generated at the end of the run."""

    prompts: list[str] = field(default_factory=lambda: [""])
    """one sample is written for each; an empty prompt starts a new document"""

    tokens: int = 60
    """most tokens of a sample"""

    temperature: float = 0.8
    """below 1 is safer, above 1 bolder, 0 always takes the likeliest token"""

    top_p: float = 0.9
    """sample from the likeliest tokens that make up this much probability"""


@dataclass
class FitConfig:
    """Train a model."""

    name: str
    """the run is written to runs/NAME; if that is taken, to runs/NAME-2 and so on"""

    model: ModelConfig
    """the model"""

    data: DataConfig
    """the text"""

    train: TrainConfig
    """the run"""

    runs: str = "runs"
    """folder of the runs"""

    seed: int = 0
    """of fresh weights, the order of documents, and dropout"""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """the optimiser"""

    log: LogConfig = field(default_factory=LogConfig)
    """where metrics go"""

    samples: SampleConfig = field(default_factory=SampleConfig)
    """texts generated at the end"""

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, found {self.seed}")
        if not self.data.path:
            raise ValueError("give data.path: a token store (make one with `prepare`)")
        if self.model.tune == "state" and self.train.strategy.startswith(("fsdp", "deepspeed_stage_3")):
            raise ValueError("model.tune: state and train.strategy contradict each other; use ddp, a state is small")
        if self.model.base != "float" and (self.train.strategy != "auto" or self.train.devices * self.train.nodes > 1):
            raise ValueError(f"model.base: {self.model.base} works on one device; use train.strategy: auto, devices: 1")
        self.check_graph()
        self.check_lanes()
        if not self.name or "/" in self.name:
            raise ValueError(f"name must be the name of a folder below {self.runs}/, found {self.name!r}")

    def check_graph(self) -> None:
        """ValueError where a step cannot be a CUDA graph."""
        train = self.train
        if not train.cuda_graph:
            return
        for other, found, remedy in (
            ("train.device: cpu", train.device == "cpu", "drop one of them"),
            ("several devices", train.devices * train.nodes > 1, "a graph is of one GPU; drop train.cuda_graph"),
            (f"train.strategy: {train.strategy}", train.strategy != "auto", "a graph is of one GPU; use auto"),
            ("model.dropout", self.model.dropout > 0, "its random numbers cannot be recorded; set it to 0"),
            ("model.tune: state", self.model.tune == "state", "its steps differ with the text; drop train.cuda_graph"),
        ):
            if found:
                raise ValueError(f"train.cuda_graph and {other} contradict each other: {remedy}")

    def check_lanes(self) -> None:
        """ValueError where devices would have unequal numbers of lanes."""
        if self.data.lanes % (self.train.devices * self.train.nodes):
            nodes = f" * train.nodes ({self.train.nodes})" if self.train.nodes > 1 else ""
            raise ValueError(
                f"data.lanes ({self.data.lanes}) must be a multiple of train.devices ({self.train.devices}){nodes}, "
                "so that every device has as many lanes"
            )

    @property
    def checkpoint_blocks(self) -> bool:
        """Whether blocks keep no activations: an adapter is trained where there is little memory."""
        return self.model.tune != "all" if self.train.checkpoint_blocks is None else self.train.checkpoint_blocks

    def steps(self, tokens: int) -> int:
        """Optimizer steps of the run, with so many tokens to train on."""
        if self.train.steps is not None:
            return self.train.steps
        read = self.data.chunk_len * self.data.horizon * self.data.lanes * self.train.accumulate
        return max(1, round(self.train.epochs * tokens / read))


def _at_least(least: int, section: str, config, name: str) -> None:
    if getattr(config, name) < least:
        raise ValueError(f"{section}.{name} must be at least {least}, found {getattr(config, name)}")
