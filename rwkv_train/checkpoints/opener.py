"""One name -> a model, its tokenizer and how chats are written for it."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_train.checkpoints.modelfile import load_model
from rwkv_train.checkpoints.names import parts_of
from rwkv_train.command_config import OpenedConfig
from rwkv_train.data.known_templates import named_template, template_of
from rwkv_train.data.store import Store
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat, compare, compare_templates
from rwkv_train.models.base import RWKV
from rwkv_train.models.quantised import BITS, kind_of, quantise
from rwkv_train.ops.products import is_quantised
from rwkv_train.program import told
from rwkv_train.tokenizer import Tokenizer, UnknownEnd, load_tokenizer, tokenizer_file

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
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    for_chats: bool = True,
    thinking: str | None = None,
) -> Opened:
    """Open what `load_model` opens, with the tokenizer and the template that lie with it, or those given.

    tokenizer: "world", "bytes" or a path; template: a name in NAMED, or a YAML file; thinking: in place of the
    template's. dtype: torch's, a name in DTYPES, or int8 or nf4: the blocks' matrices in 8 or 4 bits a number; the
    rest, and what is computed, in bf16. What is unknown, and what a given one overrides, is told on standard error; of
    the template only for_chats. Raises as `load_model` does, and ValueError if the tokenizer is unknown or does not
    fit, torch has no such device, or there is no torchao for the few bits.
    """
    _check_device(str(device))
    model = load_in(name, dtype, device)
    known = format_of(name)
    found = _tokenizer(name, known.tokenizer, tokenizer, model.config.vocab_size)
    written = _template(name, known.template, template, for_chats)
    return Opened(model, found, written if thinking is None else replace(written, thinking=thinking))


def open_for(config: OpenedConfig, name: str | Path) -> Opened:
    """The same as the settings of a command say."""
    given = config.tokenizer, config.template, config.dtype, config.device
    return open_model(name, *given, thinking=config.thinking)


def load_in(name: str | Path, dtype: torch.dtype | str | None, device: str | torch.device = "cpu") -> RWKV:
    """What `load_model` opens, in a number format as `open_model` names them; None keeps the file's."""
    if dtype in BITS:
        return quantise(load_model(name, torch.bfloat16, device), dtype)
    return load_model(name, DTYPES.get(dtype, dtype), device)


def dtype_of(model: RWKV) -> str:
    """The number format in which a model was opened, as `open_model` names it, or torch."""
    few = next(filter(is_quantised, model.parameters()), None)
    if few is not None:
        return kind_of(few)
    return {dtype: name for name, dtype in DTYPES.items()}.get(model.dtype, str(model.dtype).removeprefix("torch."))


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (not number.isdecimal() and device != kind):
        raise ValueError(f"device must be cpu, cuda or cuda:N, found {device}")
    if kind == "cuda" and torch.cuda.device_count() <= int(number or 0):
        raise ValueError(f"device: {device}, but torch sees {torch.cuda.device_count() or 'no'} GPU; use cpu")


def format_of(name: str | Path) -> TextFormat:
    """What is known of the text that a model was trained on: files in its folder, its run's folder, or beside it."""
    folder = _folder(name)
    try:
        return TextFormat.read(folder)
    except UnknownEnd as error:
        if not (folder / "config.yaml").is_file():
            raise
        told(f"{error}; the run {folder} was trained with id 0 for it")
        return TextFormat.read(folder, eod=0)


def format_to_export(name: str | Path, tokenizer: str | None, template: str | None, vocab_size: int) -> TextFormat:
    """What goes along with a model: as `open_model` takes it, but for what is not known, and its chats if unsaid."""
    known = format_of(name)
    named = tokenizer or known.tokenizer or vocab_size == 65536
    return TextFormat(
        _tokenizer(name, known.tokenizer, tokenizer, vocab_size) if named else None,
        _template(name, known.template, template) if template or known.template or _series(name) else None,
    )


def format_of_run(init: str | None, store: Store, given: str | None) -> tuple[TextFormat, list[str]]:
    """(what a run knows of its text, what is to be told of it): what the store says, or else the model it begins with.

    given: the tokenizer of a plain binidx. Raises ValueError if the store's tokenizer is not the model's.
    """
    text = store.text_format(given)
    if not init:
        return text, [] if text.tokenizer else [f"{store.path} does not say which tokenizer it was made with"]
    known = format_of(init)
    if series := _series(init):
        known = known._replace(template=known.template or series[1])
    notes = [
        compare(init, known.tokenizer, store.path, text.tokenizer, remedy_of(init)),
        compare_templates(init, known.template, store.path, text.template),
    ]
    found = TextFormat(text.tokenizer or known.tokenizer, text.template or known.template)
    return found, list(filter(None, notes))


def remedy_of(name: str | Path) -> str:
    """What to do where a text was made with another tokenizer than a model."""
    return f"prepare the text with --tokenizer {shlex.quote(str(tokenizer_file(_folder(name))))}"


def _folder(name: str | Path) -> Path:
    """Where the files lie that go with a model; those of a checkpoint of a run lie with the run."""
    path = parts_of(name)[0]
    folder = path.parent if path.is_file() else path
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _tokenizer(name: str | Path, known: Tokenizer | None, given: str | None, vocab_size: int) -> Tokenizer:
    found = load_tokenizer(given) if given else known
    if found is None:
        if vocab_size != 65536:
            what = "give --tokenizer (JSON file or bytes)"
            raise ValueError(f"{name} does not say which tokenizer it was trained with; {what}")
        told(f"{name} names no tokenizer; taken to be RWKV World's, as its 65,536 tokens suggest (see --tokenizer)")
        found = load_tokenizer("world")
    elif known and given:
        apart = f"or put the model apart from {tokenizer_file(_folder(name))} if that is not its own"
        compare(name, known, f"--tokenizer {given}", found, f"leave --tokenizer out, {apart}")
    if found.vocab_size > vocab_size:
        sizes = f"{found.vocab_size:,} tokens, the model {vocab_size:,}"
        raise ValueError(f"the tokenizer knows {sizes}; give the one it was trained with by --tokenizer")
    return found


def _series(name: str | Path) -> tuple[str, Template] | None:
    """(the name, the template) of the series that a model is of, going by its name."""
    return template_of(str(name).split("+")[0])


def _template(name: str | Path, known: Template | None, given: str | None, for_chats: bool = True) -> Template:
    if given:
        found = named_template(given)
        if other := compare_templates(name, known, f"--template {given}", found):
            told(f"{other}; --template is taken")
        return found
    if known is None:
        series, known = _series(name) or ("", Template())
        why = f"as for RWKV {series or 'world'}" + ", as its name suggests" * bool(series)
        told(f"{name} does not say how chats are written; taken to be {why} (see --template)" if for_chats else "")
    return known
