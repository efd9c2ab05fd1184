"""Settings of the benchmarks. Without torch, so that help comes at once."""

from dataclasses import dataclass, field
from typing import Literal

Operator = Literal["wkv4", "wkv7"]
Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]


@dataclass
class WkvBench:
    """Time the WKV operators' backends, forward and backward, beside peers' and a copy (2 min on 2 cores).

    Args:
        operators: wkv4 of RWKV-4, wkv7 of RWKV-7
        channels: C, the operator's width, in heads of 64 for wkv7
        lanes: B, texts side by side
        tokens: T, one row of the table for each
        dtypes: number formats of k and v; the arithmetic is float32 in all of them
        repeats: times that each contestant is measured, in turns
        budget: seconds that one contestant's repeats may take together; a slow one is repeated less
        device: cpu or cuda
        json: also write the figures to this file
    """

    operators: list[Operator] = field(default_factory=lambda: ["wkv4", "wkv7"])
    channels: int = 768
    lanes: int = 1
    tokens: list[int] = field(default_factory=lambda: [1024, 4096])
    dtypes: list[Precision] = field(default_factory=lambda: ["fp32"])
    repeats: int = 7
    budget: float = 20.0
    device: Device = "cpu"
    json: str | None = None


@dataclass
class TrainBench:
    """Time a training step's forward and backward beside transformers and its bare matrix products (7 min on 2 cores).

    Args:
        sizes: 256x4, 169M or 1.5B, or CxL or CxLxV: channels, layers, vocabulary; of an RWKV-7 as rwkv7-256x4
        tokens: length of the text, one row of the table for each; transformers takes minutes a step beyond 2048
        precisions: fp32, or bf16 for matrix products in bfloat16 with float32 weights, as train.precision has them
        lanes: texts side by side
        chunks: chunks of the exact gradient that is timed against the truncated one; 0 leaves that out
        chunk_len: tokens of such a chunk
        exact_size: the model whose exact gradient is timed
        peers: also time transformers' RWKV-4, if it is installed
        repeats: times that each contestant is measured, in turns
        budget: seconds that one contestant's repeats may take together; a slow one is repeated less
        device: cpu or cuda
        json: also write the figures to this file
    """

    sizes: list[str] = field(default_factory=lambda: ["256x4", "169M"])
    tokens: list[int] = field(default_factory=lambda: [1024, 2048])
    precisions: list[Precision] = field(default_factory=lambda: ["fp32", "bf16"])
    lanes: int = 1
    chunks: int = 32
    chunk_len: int = 512
    exact_size: str = "256x4"
    peers: bool = True
    repeats: int = 5
    budget: float = 40.0
    device: Device = "cpu"
    json: str | None = None


@dataclass
class MemoryBench:
    """Draw training memory by length of the text: this program and two of transformers' models (7 min on 2 cores).

    Each point is the peak of a process of its own that takes one forward and backward.

    Args:
        size: 256x4, 169M or 1.5B, or CxL or CxLxV: channels, layers, vocabulary; of an RWKV-7 as rwkv7-256x4
        lengths: tokens of the text
        chunk_len: tokens of a chunk of this program
        peers: also measure transformers' RWKV-4 and a transformer (GPT-NeoX) of the same width and depth
        lora_size: the models, of both generations, whose low-rank factors are trained, against reading with them; ""
            leaves that out
        limit_gb: a peer's process that holds more is ended, and its longer texts are not tried
        limit_s: the same for one that takes longer
        json: also write the figures to this file
        plot: also draw them, to NAME.svg or NAME.png
    """

    size: str = "256x4"
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192, 32768, 65536, 131072])
    chunk_len: int = 512
    peers: bool = True
    lora_size: str = "169M"
    limit_gb: float = 8.0
    limit_s: float = 60.0
    json: str | None = None
    plot: str | None = None


@dataclass
class GenerateBench:
    """Time generation, token by token, beside the package rwkv and transformers (1 min on 2 cores).

    Args:
        size: 256x4, 169M or 1.5B, or CxL or CxLxV: channels, layers, vocabulary; of an RWKV-7 as rwkv7-256x4
        tokens: tokens generated in each repeat
        prompt: tokens read before
        peers: also time the PyPI package rwkv and transformers' RWKV-4, if they are installed
        repeats: times that each contestant is measured, in turns
        budget: seconds that one contestant's repeats may take together; a slow one is repeated less
        json: also write the figures to this file
    """

    size: str = "169M"
    tokens: int = 32
    prompt: int = 64
    peers: bool = True
    repeats: int = 7
    budget: float = 30.0
    json: str | None = None


@dataclass
class GpuBench:
    """Check and time everything that runs on a GPU (8 minutes at most; torch is enough, no network is needed).

    Args:
        minutes: sections that would begin later than this are left out
        shapes: BxTxC of the WKV operator
        dtypes: number formats of k and v
        models: sizes with lanes, as 169M:8; of an RWKV-7 as rwkv7-169M:8
        chunk_lens: tokens of a training step's chunk
        lengths: tokens of the texts over which memory should stay flat
        generated: tokens generated in each repeat
        copy_mb: size of the copy that measures bandwidth, MB
        square: rows and columns of the matrix product that measures its limit
        deepspeed_steps: steps of `fit` with deepspeed_stage_2, where deepspeed is installed
        repeats: times that each contestant is measured, in turns
        json: also write the figures to this file
    """

    minutes: float = 5.0
    shapes: list[str] = field(default_factory=lambda: ["8x4096x2048", "1x4096x2048", "8x512x768", "1x512x768"])
    dtypes: list[Precision] = field(default_factory=lambda: ["bf16", "fp32"])
    models: list[str] = field(default_factory=lambda: ["169M:8", "1.5B:1", "rwkv7-169M:8"])
    chunk_lens: list[int] = field(default_factory=lambda: [512, 1024, 4096])
    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 65536])
    generated: int = 64
    copy_mb: int = 2000
    square: int = 8192
    deepspeed_steps: int = 20
    repeats: int = 5
    json: str | None = None


@dataclass
class FeedbackBench:
    """Measure corrections: are they learnt, kept, understood, and is all else left alone? (15 min on 2 cores)

    Args:
        model: checkpoint, runs/NAME, or a folder with model.pth; the small one that comes along if not given
        cases: jsonl, one correction a line, as {"question", "answer", "paraphrases", "neighbours", "same_subject"};
            false facts about countries, made for the starter model, if not given
        unrelated: file of questions, one a line, whose answers must stay; small talk if not given
        heldout: file of text on which the loss must stay; talks of strangers if not given
        tokenizer: world, bytes or a tokenizer JSON; known where tokenizer.json lies with the model
        template: YAML file that says how chats are written; template.yaml with the model, or RWKV World's if not given
        counts: corrections one after another
        controls: the same for recipes that do worse: rate 0, naive, state only
        seeds: runs of each recipe, with other draws of cases
        json: also write the figures to this file
        plot: also draw them, to NAME.svg or NAME.png
    """

    model: str | None = None
    cases: str | None = None
    unrelated: str | None = None
    heldout: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    counts: list[int] = field(default_factory=lambda: [1, 10, 100])
    controls: list[int] = field(default_factory=lambda: [10])
    seeds: int = 3
    json: str | None = None
    plot: str | None = None
