"""Settings of the short commands and of the chat; those of a run are in config.py, others beside what they set."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ValidateConfig:
    """Score a model on text.

    Args:
        model: checkpoint, or runs/NAME, which is scored on what its training held out unless data says otherwise
        data: token store to score on
        val_share: score only the share of data that `fit` would hold out; 0 is all of it
        tokenizer: world, bytes or a tokenizer JSON; only for .bin/.idx files, which do not name theirs
        lanes: documents read side by side
        chunk_len: tokens read at once
        compare: also score with the state dropped at every chunk, to see what carrying it buys
        json: also write the figures to this file
    """

    model: str
    data: str | None = None
    val_share: float = 0.0
    tokenizer: str | None = None
    lanes: int = 8
    chunk_len: int = 512
    compare: bool = True
    json: str | None = None


@dataclass
class GenerateConfig:
    """Write a continuation of a prompt.

    Args:
        model: checkpoint or runs/NAME
        prompt: text to continue; "\\n" stands for a line break; an empty one starts a new document
        tokenizer: world, bytes or a tokenizer JSON; known for runs/NAME and for models with the World vocabulary
        tokens: most tokens to write
        temperature: below 1 is safer, above 1 bolder, 0 always takes the likeliest token
        top_p: sample from the likeliest tokens that make up this much probability
        top_k: sample from this many of the likeliest tokens; 0 is all
        seed: the same seed writes the same text
        device: cpu, cuda or cuda:N
    """

    model: str
    prompt: str = ""
    tokenizer: str | None = None
    tokens: int = 200
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    seed: int = 0
    device: str = "cpu"


@dataclass
class ChatConfig:
    """Talk to a model in the terminal; /help there lists what else can be typed.

    Args:
        model: checkpoint, runs/NAME, or a folder with model.pth; the small one that comes along if not given
        tokenizer: world, bytes or a tokenizer JSON; known where tokenizer.json lies with the model
        template: YAML file that says how chats are written; template.yaml with the model, or RWKV World's if not given
        system: a system message to begin with
        temperature: below 1 is safer, above 1 bolder, 0 always takes the likeliest token
        top_p: sample from the likeliest tokens that make up this much probability
        top_k: sample from this many of the likeliest tokens; 0 is all
        presence_penalty: taken from the logit of every token that the reply so far holds
        frequency_penalty: the same, once for each time the token is in the reply
        seed: the same seed and the same messages give the same replies
        tokens: most tokens of a reply
        plain: one line in, one block of plain text out; on by itself where standard input is no terminal
        room: read lines "user: text" of a live chat from standard input and answer them in one shared dialogue
        prefix: room: only messages that begin with it are taken; "" takes all
        pick: room: which of the waiting messages is answered next
        queue: room: messages that wait at most
        per_user: room: messages of one user that wait at most
        rate: room: messages of one user that are taken in a minute at most
        operators: room: users who may give commands ("!/help"), separated by commas
        folder: where typed lines, saved dialogues and corrections are kept; the user's data folder if not given
        profile: corrections are kept in FOLDER/profiles/PROFILE; the model's name if not given
        device: cpu, cuda or cuda:N
        dtype: number format of the weights in memory; corrections need fp32
    """

    model: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    system: str = ""
    temperature: float = 0.8
    top_p: float = 0.5
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    tokens: int = 500
    plain: bool = False
    room: bool = False
    prefix: str = "!"
    pick: Literal["fifo", "random", "newest"] = "fifo"
    queue: int = 50
    per_user: int = 3
    rate: int = 10
    operators: str = ""
    folder: str | None = None
    profile: str | None = None
    device: str = "cpu"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"


@dataclass
class FeedbackFileConfig:
    """Learn a file of corrections, one after another.

    Args:
        model: checkpoint, runs/NAME, or a folder with model.pth
        file: jsonl with one correction a line, as {"question": "...", "answer": "..."}
        tokenizer: world, bytes or a tokenizer JSON; known where tokenizer.json lies with the model
        template: YAML file that says how chats are written; template.yaml with the model, or RWKV World's if not given
        folder: where corrections are kept; the user's data folder if not given
        profile: corrections are kept in FOLDER/profiles/PROFILE; the model's name if not given
    """

    model: str
    file: str
    tokenizer: str | None = None
    template: str | None = None
    folder: str | None = None
    profile: str | None = None


@dataclass
class InspectConfig:
    """Print the exact batch of one optimizer step of a run.

    Args:
        run: runs/NAME
        step: the step, as metrics.jsonl counts them: from 1
        tokens: tokens shown of each stretch of text
    """

    run: str
    step: int
    tokens: int = 24


@dataclass
class ReportConfig:
    """Write what a run has done so far as one HTML page, RUN/report.html, and its pictures as PNG.

    Args:
        run: runs/NAME, finished or not
    """

    run: list[str]


@dataclass
class ExportConfig:
    """Write a model in another format.

    Args:
        model: checkpoint or runs/NAME
        out: NAME.pth (RWKV-LM, ChatRWKV), NAME.safetensors, or a folder (Hugging Face)
        dtype: number format of the weights; that of the model if not given
        adapter: write only what a run with model.tune trained, the low-rank factors or the state
    """

    model: str
    out: str
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    adapter: bool = False
