"""Settings of the short commands and of the chat; those of a run are in config.py, others beside what they set."""

import ast
import inspect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from rwkv_train.config import Thinking


def explained(config: type, field: str) -> str:
    """A setting's explanation: the string under it, also where it is inherited."""
    owners = [ast.parse(inspect.getsource(owner)).body[0] for owner in config.__mro__[:-1]]
    texts = [
        after.value.value
        for owner in owners
        for node, after in pairwise(owner.body)
        if isinstance(node, ast.AnnAssign) and node.target.id == field and isinstance(after, ast.Expr)
    ]
    return " ".join(texts[0].split())


Preset = Literal["chat", "text", "greedy", "thinking", "fake-thinking"]


@dataclass(kw_only=True)
class SamplingConfig:
    """How tokens are chosen, and where a text ends: for all commands that write text."""

    preset: Preset = "chat"
    """values of the settings below that are not given: chat (temperature 0.8, top_p 0.5), text (temperature 1,
    top_p 0.9), greedy (temperature 0), thinking (temperature 0.96, top_p 0.76, top_k 32, presence_penalty 1,
    frequency_penalty 0.1, penalty_decay 0.988) or fake-thinking (temperature 1, top_p 0.28, top_k 32). A server's
    requests may name others"""

    temperature: float | None = None
    """below 1 is safer, above 1 bolder, 0 always takes the likeliest token; the preset's if not given, as all below"""

    top_p: float | None = None
    """sample from the likeliest tokens that make up this much probability; 1 is all"""

    top_k: int | None = None
    """sample from this many of the likeliest tokens; 0 is all"""

    min_p: float | None = None
    """leave out tokens that are less likely than the likeliest one times this; 0 leaves out none"""

    presence_penalty: float | None = None
    """taken from the logit of every token that the reply so far holds; 0 is none"""

    frequency_penalty: float | None = None
    """the same, once for each time the token is in the reply; 0 is none"""

    penalty_decay: float | None = None
    """what frequency_penalty counts shrinks by this factor with each token of the reply; 1 forgets nothing"""

    stop: list[str] = field(default_factory=list, metadata={"texts": True})
    """end before this text, which is not shown; \\n in it is a line break, \\\\ a backslash. For several texts give it
    several times, or a list in YAML"""


@dataclass(kw_only=True)
class OpenedConfig:
    """How a model is opened, and where what belongs to its user is kept: for all commands that talk with one."""

    tokenizer: str | None = None
    """world, bytes or a tokenizer JSON; known where tokenizer.json lies with the model"""

    template: str | None = None
    """how chats are written: world, g1, raven, or a YAML file; if not given, as template.yaml or the chat_template with
    the model says, or else as its name suggests"""

    thinking: Thinking | None = None
    """how a model that was taught to think does so: off; fake, it replies after an empty thought; on; normal, short or
    long, where it is asked for a thought of such a length. As the template says if not given"""

    folder: str | None = None
    """where corrections, and what was said and typed, are kept; the user's data folder if not given"""

    device: str = "cpu"
    """cpu, cuda or cuda:N"""

    dtype: Literal["fp32", "fp16", "bf16", "int8", "nf4"] = "fp32"
    """number format of the weights in memory; those that corrections train are fp32 in any case, and a profile belongs
    to the one it was begun with. int8 and nf4, 8 and 4 bits a number of the blocks' matrices, need torchao"""

    memory: float | None = None
    """GB that a correction may take, the model counted (2^30 bytes); most of the device's if not given. A new profile
    trains as much of the model as fits into that"""


@dataclass
class ValidateConfig:
    """Score a model on text."""

    model: str
    """checkpoint, hf:OWNER/REPO/FILE, or runs/NAME, which is scored on what its training held out unless data says
    otherwise"""

    data: str | None = None
    """token store to score on"""

    val_share: float = 0.0
    """score only the share of data that `fit` would hold out; 0 is all of it"""

    tokenizer: str | None = None
    """world, bytes or a tokenizer JSON; only for .bin/.idx files, which do not name theirs"""

    lanes: int = 8
    """documents read side by side"""

    chunk_len: int = 512
    """tokens read at once"""

    compare: bool = True
    """also score with the state dropped at every chunk, to see what carrying it buys"""

    json: str | None = None
    """also write the figures to this file"""

    dtype: Literal["fp32", "fp16", "bf16", "int8", "nf4"] | None = None
    """number format of the weights in memory; that of the file if not given"""


@dataclass
class GenerateConfig(SamplingConfig):
    """Write a continuation of a prompt, or of many side by side."""

    model: str
    """checkpoint, runs/NAME or hf:OWNER/REPO/FILE"""

    prompt: str = ""
    """text to continue; \\n in it is a line break, \\\\ a backslash; an empty one starts a new document"""

    prompts: str | None = None
    """file with a prompt in each line, as above, in place of prompt; blank lines are left out"""

    lanes: int | None = None
    """prompts of the file that are continued side by side; 16 if not given"""

    tokenizer: str | None = None
    """world, bytes or a tokenizer JSON; known for runs/NAME and for models with the World vocabulary"""

    tokens: int = 200
    """most tokens to write"""

    seed: int = 0
    """the same seed writes the same text; each further prompt of a file has the next seed"""

    device: str = "cpu"
    """cpu, cuda or cuda:N"""

    dtype: Literal["fp32", "fp16", "bf16", "int8", "nf4"] | None = None
    """number format of the weights in memory; that of the file if not given"""

    preset: Preset = field(default="text", kw_only=True)


@dataclass
class ChatConfig(OpenedConfig, SamplingConfig):
    """Talk to a model in the terminal; /help there lists what else can be typed."""

    model: str | None = None
    """checkpoint, runs/NAME, hf:OWNER/REPO/FILE, or a folder with model.pth; the small one that comes along if
    not given"""

    system: str = ""
    """a system message to begin with"""

    tools: str | None = None
    """JSON file that lists functions the model may call, as OpenAI's API has them; the system message names them"""

    seed: int = 0
    """the same seed and the same messages give the same replies"""

    tokens: int = 500
    """most tokens of a reply"""

    plain: bool = False
    """one line in, one block of plain text out; on by itself where standard input is no terminal"""

    room: bool = False
    """read lines "user: text" of a live chat from standard input and answer them in one shared dialogue"""

    prefix: str = "!"
    """room: only messages that begin with it are taken; "" takes all"""

    pick: Literal["fifo", "random", "newest"] = "fifo"
    """room: which of the waiting messages is answered next"""

    queue: int = 50
    """room: messages that wait at most"""

    per_user: int = 3
    """room: messages of one user that wait at most"""

    rate: int = 10
    """room: messages of one user that are taken in a minute at most"""

    operators: str = ""
    """room: users who may give commands ("!/help"), separated by commas"""

    profile: str | None = None
    """corrections are kept in FOLDER/profiles/PROFILE; the model's name if not given"""


@dataclass
class FeedbackFileConfig(OpenedConfig):
    """Learn a file of corrections, one after another, or all that a profile has together."""

    model: str
    """checkpoint, runs/NAME, hf:OWNER/REPO/FILE, or a folder with model.pth"""

    file: str | None = None
    """jsonl with one correction a line, as {"question": "...", "answer": "..."}; or another profile's folder, to
    learn its corrections anew"""

    sleep: bool = False
    """then learn all corrections of the profile together, and keep that if it is better"""

    profile: str | None = None
    """corrections are kept in FOLDER/profiles/PROFILE; the model's name if not given"""


@dataclass
class InspectConfig:
    """Print the exact batch of one optimizer step of a run."""

    run: str
    """runs/NAME"""

    step: int
    """the step, as metrics.jsonl counts them: from 1"""

    tokens: int = 24
    """tokens shown of each stretch of text"""


@dataclass
class ReportConfig:
    """Write what a run has done so far as one HTML page, RUN/report.html, and its pictures as PNG."""

    run: list[str]
    """runs/NAME, finished or not"""


@dataclass
class ExportConfig:
    """Write a model in another format."""

    model: str
    """checkpoint, runs/NAME or hf:OWNER/REPO/FILE"""

    out: str
    """NAME.pth (RWKV-LM, ChatRWKV), NAME.safetensors, or a folder (Hugging Face)"""

    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """number format of the weights; that of the model if not given"""

    tokenizer: str | None = None
    """for a folder: world, bytes or a tokenizer JSON, where the model does not say it"""

    template: str | None = None
    """for a folder: how chats are written, as a name or a YAML file; what lies with the model if not given"""

    profile: str | None = None
    """with the corrections of this profile, as chat has it"""

    folder: str | None = None
    """where profiles are kept; the user's data folder if not given"""

    adapter: bool = False
    """write only what a run with model.tune trained, the factors or the state; a folder is then PEFT's"""
