"""One name -> a model, its tokenizer and how chats are written for it."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_train.checkpoints.modelfile import load_model, parts_of
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.models.base import RWKV
from rwkv_train.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Opened(NamedTuple):
    """A model and what it was trained with."""

    model: RWKV
    tokenizer: Tokenizer
    template: Template


def open_model(
    name: str | Path,
    tokenizer: str | None = None,
    template: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    for_chats: bool = True,
) -> Opened:
    """Open what `load_model` opens, with the tokenizer and the template that lie with it, or those given.

    tokenizer: "world", "bytes" or a path; template: a YAML file. What is unknown, and what a given one overrides, is
    told on standard error; of the template only for_chats. Raises as `load_model` does, and ValueError if the tokenizer
    is unknown or does not fit.
    """
    model = load_model(name, dtype, device)
    known = format_of(name)
    found = _tokenizer(name, known, tokenizer, model.config.vocab_size)
    return Opened(model, found, _template(name, known.template, template, for_chats))


def format_of(name: str | Path) -> TextFormat:
    """What is known of the text that a model was trained on: files in its folder, its run's folder, or beside it."""
    return TextFormat.read(_folder(parts_of(name)[0]))


def _folder(path: Path) -> Path:
    """Where the files lie that go with a model; those of a checkpoint of a run lie with the run."""
    folder = path.parent if path.is_file() else path
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _tokenizer(name: str | Path, known: TextFormat, given: str | None, vocab_size: int) -> Tokenizer:
    found = load_tokenizer(given) if given else known.tokenizer
    if found is None:
        if vocab_size != 65536:
            raise ValueError(
                f"{name} does not say which tokenizer it was trained with; give --tokenizer (JSON file or bytes)"
            )
        _note(f"{name} names no tokenizer; taken to be RWKV World's, as its 65,536 tokens suggest (see --tokenizer)")
        found = load_tokenizer("world")
    if found.vocab_size > vocab_size:
        sizes = f"{found.vocab_size:,} tokens, the model {vocab_size:,}"
        raise ValueError(f"the tokenizer knows {sizes}; give the one it was trained with by --tokenizer")
    return found


def _template(name: str | Path, known: Template | None, given: str | None, told: bool) -> Template:
    if given:
        found = Template.load(given)
        if known and known.roles != found.roles:
            _note(f"chats are written as --template {given} says, and not as {name} was trained: {known.other(found)}")
        return found
    if known is None and told:
        _note(f"{name} does not say how chats are written; taken to be as for RWKV World (see --template)")
    return known or Template()


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
