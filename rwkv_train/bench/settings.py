"""Settings of the benchmarks. Without torch, so that help comes at once."""

from dataclasses import dataclass, field
from typing import Literal

Operator = Literal["wkv4", "wkv7"]
Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]


@dataclass
class WkvBench:
    """Time the WKV operators' backends, forward and backward, beside peers' and a copy (2 min on 2 cores)."""

    operators: list[Operator] = field(default_factory=lambda: ["wkv4", "wkv7"])
    """wkv4 of RWKV-4, wkv7 of RWKV-7"""

    channels: int = 768
    """C, the operator's width, in heads of 64 for wkv7"""

    lanes: int = 1
    """B, texts side by side"""

    tokens: list[int] = field(default_factory=lambda: [1024, 4096])
    """T, one row of the table for each"""

    dtypes: list[Precision] = field(default_factory=lambda: ["fp32"])
    """number formats of k and v; the arithmetic is float32 in all of them"""

    repeats: int = 7
    """times that each contestant is measured, in turns"""

    budget: float = 20.0
    """seconds that one contestant's repeats may take together; a slow one is repeated less"""

    device: Device = "cpu"
    """cpu or cuda"""

    json: str | None = None
    """also write the figures to this file"""


@dataclass
class TrainBench:
    """Time a step's forward and backward beside transformers and its bare matrix products (7 min on 2 cores)."""

    sizes: list[str] = field(default_factory=lambda: ["256x4", "169M"])
    """256x4, 169M or 1.5B, or CxL or CxLxV: channels, layers, vocabulary; of an RWKV-7 as rwkv7-256x4"""

    tokens: list[int] = field(default_factory=lambda: [1024, 2048])
    """length of the text, one row of the table for each; transformers takes minutes a step beyond 2048"""

    precisions: list[Precision] = field(default_factory=lambda: ["fp32", "bf16"])
    """fp32, or bf16 for matrix products in bfloat16 with float32 weights, as train.precision has them"""

    lanes: int = 1
    """texts side by side"""

    chunks: int = 32
    """chunks of the exact gradient that is timed against the truncated one; 0 leaves that out"""

    chunk_len: int = 512
    """tokens of such a chunk"""

    exact_size: str = "256x4"
    """the model whose exact gradient is timed"""

    peers: bool = True
    """also time transformers' RWKV-4, if it is installed"""

    repeats: int = 5
    """times that each contestant is measured, in turns"""

    budget: float = 40.0
    """seconds that one contestant's repeats may take together; a slow one is repeated less"""

    device: Device = "cpu"
    """cpu or cuda"""

    json: str | None = None
    """also write the figures to this file"""


@dataclass
class MemoryBench:
    """Draw training memory by length of the text: this program and two of transformers' models (7 min on 2 cores).

    Each point is the peak of a process of its own that takes one forward and backward.
    """

    size: str = "256x4"
    """256x4, 169M or 1.5B, or CxL or CxLxV: channels, layers, vocabulary; of an RWKV-7 as rwkv7-256x4"""

    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192, 32768, 65536, 131072])
    """tokens of the text"""

    chunk_len: int = 512
    """tokens of a chunk of this program"""

    peers: bool = True
    """also measure transformers' RWKV-4 and a transformer (GPT-NeoX) of the same width and depth"""

    lora_size: str = "169M"
    """the models, of both generations, whose low-rank factors are trained, against reading with them; "" leaves that
    out"""

    limit_gb: float = 8.0
    """a peer's process that holds more is ended, and its longer texts are not tried"""

    limit_s: float = 60.0
    """the same for one that takes longer"""

    json: str | None = None
    """also write the figures to this file"""

    plot: str | None = None
    """also draw them, to NAME.svg or NAME.png"""


@dataclass
class GenerateBench:
    """Time generation, token by token, beside the package rwkv and transformers (2 min on 2 cores)."""

    size: str = "169M"
    """256x4, 169M or 1.5B, or CxL or CxLxV: channels, layers, vocabulary; of an RWKV-7 as rwkv7-256x4"""

    tokens: int = 32
    """tokens generated in each repeat"""

    prompt: int = 64
    """tokens read before"""

    lanes: int = 16
    """texts that are also generated side by side"""

    peers: bool = True
    """also time the PyPI package rwkv and transformers' RWKV-4, if they are installed"""

    repeats: int = 7
    """times that each contestant is measured, in turns"""

    budget: float = 30.0
    """seconds that one contestant's repeats may take together; a slow one is repeated less"""

    json: str | None = None
    """also write the figures to this file"""


@dataclass
class GpuBench:
    """Check and time everything that runs on a GPU (8 minutes at most; torch is enough, no network is needed)."""

    minutes: float = 8.0
    """all ends then: what is running is ended, and what has not begun is left out"""

    shapes: list[str] = field(default_factory=lambda: ["8x4096x2048", "1x4096x2048", "8x512x768", "1x512x768"])
    """BxTxC of the WKV operator"""

    dtypes: list[Precision] = field(default_factory=lambda: ["bf16", "fp32"])
    """number formats of k and v"""

    models: list[str] = field(
        default_factory=lambda: ["rwkv7-2048x24x65536:1", "1.5B:1", "rwkv7-768x12x65536:8", "169M:8"]
    )
    """sizes with lanes, as 169M:8; of an RWKV-7 as rwkv7-169M:8"""

    chunk_lens: list[int] = field(default_factory=lambda: [1024, 4096])
    """tokens of a training step's chunk"""

    memory_model: str = "169M"
    """the size whose memory is measured"""

    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 65536])
    """tokens of the texts over which memory should stay flat"""

    generated: int = 64
    """tokens generated in each repeat"""

    copy_mb: int = 2000
    """size of the copy that measures bandwidth, MB"""

    square: int = 8192
    """rows and columns of the matrix product that measures its limit"""

    deepspeed_steps: int = 20
    """steps of `fit` with deepspeed_stage_2, where deepspeed is installed"""

    tests: bool = False
    """also run the tests of the kernels on a GPU, where this is a clone and pytest is installed"""

    repeats: int = 5
    """times that each contestant is measured, in turns"""

    device: Device = "cuda"
    """cuda, or cpu to see whether all of it runs"""

    json: str | None = None
    """also write the figures to this file, after each of them"""


@dataclass
class FeedbackBench:
    """Measure corrections: are they learnt, kept, understood, and is all else left alone? (15 min on 2 cores)"""

    model: str | None = None
    """checkpoint, runs/NAME, hf:OWNER/REPO/FILE, or a folder with model.pth; the small one that comes along if
    not given"""

    cases: str | None = None
    """open, corrections of eight kinds of talk, written by hand; open-final, others like them, not to be tuned to;
    thousand, a thousand, most of them made by rule; or jsonl, one correction a line, as {"question", "answer",
    "paraphrases", "neighbours", "same_subject", "kind", "language", "before"}; false facts about countries, made for
    the starter model, if not given"""

    kinds: list[str] = field(default_factory=list)
    """only cases of these kinds"""

    limit: int | None = None
    """so many cases at most, evenly from the first to the last"""

    unrelated: str | None = None
    """file of questions, one a line, whose answers must stay; small talk that the starter model has read
    and, as "unread", strangers' questions that it has not, if not given"""

    heldout: str | None = None
    """file of text on which the loss must stay; talks of strangers if not given"""

    tokenizer: str | None = None
    """world, bytes or a tokenizer JSON; known where tokenizer.json lies with the model"""

    template: str | None = None
    """YAML file that says how chats are written; template.yaml with the model, or RWKV World's if not given"""

    counts: list[int] | None = None
    """corrections one after another; 1 is each on its own, and the others are measured on the way of one stream. What
    the cases are made for if not given: [1, 10, 100] of countries, [1, 30, 100] of kinds of talk, up to 1000 of
    thousand"""

    controls: list[int] | None = None
    """the same for recipes to compare with: of countries naive, step_factor 0 and state only, which do worse; of other
    cases naive, and joint, which learns all together, the best that can be expected"""

    recipe: str | None = None
    """settings of how a correction is learnt, as steps=10,replay=8"""

    also: bool = False
    """the first paraphrase of each case is taught as another way to ask, and only the others are measured"""

    before: int = 0
    """tokens of small talk before each correction, at least; three questions and answers if not given"""

    seeds: int = 3
    """runs of each recipe, with other draws or another order of the cases"""

    json: str | None = None
    """also write the figures to this file, as soon as there are some"""

    answers: str | None = None
    """also write the answers behind the figures to this file, a line for each case of each run"""

    plot: str | None = None
    """also draw them, to NAME.svg or NAME.png"""


@dataclass
class ServeBench:
    """Load a server: sessions side by side, while corrections are learnt, after long histories (4 min on 2 cores).

    The server is a process of its own; the clients are in this one and share the processor with it.
    """

    model: str | None = None
    """checkpoint, runs/NAME, hf:OWNER/REPO/FILE, or a folder with model.pth; the small one that comes along if
    not given"""

    tokenizer: str | None = None
    """world, bytes or a tokenizer JSON; known where tokenizer.json lies with the model"""

    dtype: Literal["fp32", "fp16", "bf16", "int8", "nf4"] | None = None
    """number format of the weights in memory; that of the file if not given"""

    sessions: list[int] = field(default_factory=lambda: [1, 16])
    """sessions that stream side by side, one row of the table for each"""

    tokens: int = 128
    """tokens of a reply, at most; replies in a conversation end earlier"""

    seconds: float = 5.0
    """time for which each of them streams"""

    crowd: int = 64
    """sessions that stream while corrections are learnt, and before"""

    turns: int = 4
    """turns of each of its conversations, after which it begins another"""

    crowd_seconds: float = 20.0
    """time for which the crowd streams without corrections"""

    corrections: int = 3
    """corrections that are then learnt, one after another; one more is learnt before"""

    history: list[int] = field(default_factory=lambda: [10, 10_000])
    """tokens said before a turn whose first token is timed"""

    company: int = 15
    """others beside which a text must be what it is alone"""

    peers: bool = True
    """also load the PyPI package rwkvserve, if it is installed"""

    repeats: int = 5
    """times that each is measured, in turns"""

    json: str | None = None
    """also write the figures to this file"""
