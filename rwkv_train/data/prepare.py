"""`prepare`: texts, chats and pairs from any source to a token store, on all cores, in order."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rwkv_train.config import Thinking
from rwkv_train.data.encode import Encoded, Encoder, encode
from rwkv_train.data.known_templates import named_template
from rwkv_train.data.records import Split, read
from rwkv_train.data.render import Columns
from rwkv_train.data.sources import Passed, Raw, Source, resolve
from rwkv_train.data.store import Store, StoreWriter, check_free
from rwkv_train.data.summary import KINDS, Tally, print_summary
from rwkv_train.data.templates import Template
from rwkv_train.tokenizer import Tokenizer, load_tokenizer, train_bpe

# What each way to read sources did not know yet; one is added when the same sources are read in another way.
UNKNOWN = {1: "messages of weight 0, system columns and null columns", 2: "tools and calls of functions"}
READING = len(UNKNOWN) + 1
# Settings that only records of one kind know.
FLAGS = {
    "text": ("text_field",),
    "pairs": ("prompt_field", "completion_field"),
    "messages": ("messages_field", "template", "thinking", "train_roles"),
}


@dataclass
class PrepareConfig:
    """What `prepare` reads, and how it becomes tokens."""

    sources: list[str]
    """Files (.txt .jsonl .json .csv .tsv .parquet), folders, globs, "corpus:chatterbot", "corpus:python-topics", or
    data sets of the Hugging Face hub as "hub:NAME[@CONFIG][:SPLIT]"."""

    out: str
    """Folder of the token store to make."""

    tokenizer: str | None = None
    """"world" (the default), "bytes", or the path of a tokenizers JSON or of a folder with one."""

    eod: str | None = None
    """Name or id of the token that ends a document, where the tokenizer's files do not say it."""

    train_bpe: int = 0
    """Learn a byte-level BPE of this many ids from the sources instead; 0 = do not."""

    kind: Literal["auto", "text", "pairs", "messages"] = "auto"
    """What records are: texts, prompt and completion pairs, chat messages; "auto" looks at each one."""

    text_field: str = "text"
    """Column that holds a text."""

    prompt_field: str = "prompt"
    """Column of a pair's prompt, not trained; several ("instruction,input") are joined by newlines."""

    completion_field: str = "completion"
    """Column of a pair's completion, trained."""

    messages_field: str = "messages"
    """Column that holds the list of a chat's messages."""

    template: str | None = None
    """How chats are written: world, g1 or raven, as these series of released models have it, or a YAML file; world if
    not given ("User: ...", blank line, "Assistant: ...", blank line)."""

    thinking: Thinking | None = None
    """How a chat's last reply begins: fake, with an empty thought; on, normal, short or long, with its own; off, or not
    given, with its own if it has one."""

    train_roles: list[str] | None = None
    """Roles whose messages are trained, instead of the template's (assistant)."""

    split: Split = "file"
    """What is one document of a .txt file: the file, a paragraph (blank lines between), or a line."""

    limit: int = 0
    """Read only this many records; 0 = all."""

    skip_bad: bool = False
    """Count and leave out records that cannot be read, instead of stopping at the first."""

    workers: int = 0
    """Processes that tokenise; 0 = one a core. The store is the same for any number."""

    overwrite: bool = False
    """Replace the store at `out`."""


def prepare(config: PrepareConfig) -> Store:
    """Make the token store that `config` asks for, or return it if it is there and its sources are unchanged.

    Raises ValueError for contradictions, missing files, bad records ("file:line: what"), a different store
    at `out`, and sources without anything to train.
    """
    _check(config)
    out, (sources, passed) = Path(config.out).expanduser(), resolve(config.sources)
    if config.split != "file" and all(source.suffix != ".txt" for source in sources):
        raise ValueError(f"--split {config.split} cuts .txt files, and there is none among the sources. Leave it out.")
    texts = [source.name for source in sources if source.suffix == ".txt"]
    if config.kind in ("pairs", "messages") and texts:
        what = f"{texts[0]} is plain text" + f", as are {len(texts) - 1} more" * (len(texts) > 1)
        raise ValueError(f"--kind {config.kind}, but {what}. Leave .txt files out of the sources, or leave out --kind.")
    changes = {name: value for name in ("train_roles", "thinking") if (value := getattr(config, name)) is not None}
    template = replace(named_template(config.template or "world"), **changes)
    columns = Columns(config.text_field, config.prompt_field, config.completion_field, config.messages_field)
    tokenizer = None if config.train_bpe else load_tokenizer(config.tokenizer or "world", config.eod)
    request = _request(config, sources, template, columns, tokenizer)
    if not config.overwrite and (store := _up_to_date(out, request, tokenizer)):
        return store
    check_free(out, config.overwrite)

    encoder = Encoder(tokenizer, config.kind, template, columns)
    if tokenizer is None:
        print(f"Learning a tokenizer of {config.train_bpe} ids ...", flush=True)
        tokenizer = train_bpe(_texts(config, sources, encoder), config.train_bpe)
        encoder = Encoder(tokenizer, config.kind, template, columns)
    with StoreWriter(out, tokenizer, config.overwrite) as writer:
        tally = _write(config, sources, encoder, writer, Tally(passed, _several_times(sources)))
        if not writer.documents:
            first = f" The first one: {tally.listed[0]}." if tally.bad else ""
            raise ValueError(f"{', '.join(config.sources)}: no usable record, {tally.bad} bad ones.{first}")
        if not writer.trained_tokens:
            what = (
                f"no message of the trained roles ({', '.join(template.train_roles) or 'none'}) whose weight is not 0"
            )
            raise ValueError(f"Nothing to train: {what}. See --train-roles.")
        writer.manifest = {"sources": list(config.sources), "bad_records": tally.bad, "request": request}
        writer.manifest["chats"] = tally.kinds["messages"]
    store = Store.open(out)
    tally.notes += _without_effect(config, tally)
    if text := tokenizer.end_in_texts:
        tally.notes.append(f"the end of a document, {tokenizer.eod}, is {text!r} in texts, too, and ends them there")
    print_summary(config.out, store, tally)
    return store


def _check(config: PrepareConfig) -> None:
    if not config.sources:
        raise ValueError("There is nothing to read. Give files, folders or data sets with --sources.")
    if config.tokenizer is not None and config.train_bpe:
        given = f"--tokenizer {config.tokenizer} and --train-bpe {config.train_bpe}"
        raise ValueError(f"{given} contradict each other: use a tokenizer or learn one.")
    if config.eod is not None and config.train_bpe:
        raise ValueError(f"--eod {config.eod} is of no use with --train-bpe: a learnt tokenizer has its own. Drop it.")
    for name in ("train_bpe", "limit", "workers"):
        if getattr(config, name) < 0:
            raise ValueError(f"{_flag(name)} is {getattr(config, name)}, it must not be negative.")
    for kind, names in FLAGS.items():
        if config.kind not in ("auto", kind) and (given := [name for name in names if _is_given(config, name)]):
            flags = " and ".join(map(_flag, given))
            raise ValueError(f"--kind {config.kind} has no use for {flags}. Leave one of them out.")


def _is_given(config: PrepareConfig, name: str) -> bool:
    return getattr(config, name) != PrepareConfig.__dataclass_fields__[name].default


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _several_times(sources: list[Source]) -> list[str]:
    """A sentence for each file that is read more than once, as a folder and something in it were named."""
    counts = Counter(os.path.realpath(source.name) for source in sources if source.kind == "file")
    return [f"{name} was named {count} times, and is read as often" for name, count in counts.items() if count > 1]


def _without_effect(config: PrepareConfig, tally: Tally) -> list[str]:
    """A sentence for each setting of a kind of record that there was none of."""
    return [
        f"{_flag(name)} had no effect: no record is a {KINDS[kind]}"
        for kind, names in FLAGS.items()
        if not tally.kinds[kind]
        for name in names
        if _is_given(config, name)
    ]


def _request(
    config: PrepareConfig,
    sources: list[Source],
    template: Template,
    columns: Columns,
    tokenizer: Tokenizer | None,
) -> dict:
    """Everything the store's content depends on, as plain JSON."""
    return {
        "sources": [source.signature() for source in sources],
        "tokenizer": tokenizer.fingerprint if tokenizer else f"train_bpe {config.train_bpe}",
        "reading": READING,
        "kind": config.kind,
        "columns": asdict(columns),
        "template": template.as_dict(),
        **{name: getattr(config, name) for name in ("split", "limit", "skip_bad")},
    }


def _up_to_date(out: Path, request: dict, tokenizer: Tokenizer | None) -> Store | None:
    """The store at `out` if `request` made it, None if there is none; ValueError for a different one."""
    if not (out / "manifest.json").is_file():
        return None
    try:
        store = Store.open(out)
    except ValueError as error:
        raise ValueError(f"{error} Replace it with --overwrite.") from None
    made_by = {"reading": 1} | (store.manifest.get("request") or {})
    unknown = [what for reading, what in UNKNOWN.items() if reading >= made_by["reading"]]
    made_by["reading"] = READING
    different = [key for key in request if made_by.get(key) != request[key]]
    if tokenizer and tokenizer.eod != store.eod:
        different.append(f"end of document {tokenizer.eod}, there {store.eod}")
    if different:
        hint = "Choose another --out, or replace it with --overwrite."
        raise ValueError(f"{out} was made from something else (different: {', '.join(different)}). {hint}")
    print(f"{out} is up to date: {len(store):,} documents, {len(store.tokens):,} tokens.")
    if unknown:
        known = ", and no ".join(unknown)
        print(f"It was made by an earlier version, which knew no {known}; --overwrite reads the sources anew.")
    return store


def _records(config: PrepareConfig, sources: list[Source], encoder: Encoder, tally: Tally) -> Iterator[Raw]:
    """The records of all sources; what is to be told of the sources goes to `tally`."""
    done = 0
    for source in sources:
        before = done
        for raw in read(source, config.split, encoder.columns, tally.notes):
            yield raw
            done += raw.last
            if config.limit and done >= config.limit:
                return
        if done == before:
            tally.passed.append(Passed("without a record", source.name))


def _texts(config: PrepareConfig, sources: list[Source], encoder: Encoder) -> Iterator[str]:
    for raw in _records(config, sources, encoder, Tally()):
        try:
            yield encoder.text(raw)
        except ValueError as error:
            if not config.skip_bad:
                raise _bad_record(raw, str(error)) from None


def _bad_record(raw: Raw, error: str) -> ValueError:
    return ValueError(f"{raw.where}: {error.rstrip('.')}. Correct it, or leave such records out with --skip-bad.")


def _write(config: PrepareConfig, sources: list[Source], encoder: Encoder, writer: StoreWriter, tally: Tally) -> Tally:
    """Write all records and count them."""
    from tqdm import tqdm

    sizes = [source.size for source in sources]
    known = all(size is not None for size in sizes) and not config.limit
    bar = {"total": sum(sizes), "unit": "B"} if known else {"unit": " documents"}
    results = encode(encoder, _records(config, sources, encoder, tally), config.workers)
    # Closing the generator at once, also on an error, ends its processes before the store is put in place.
    with tqdm(desc="prepare", unit_scale=True, disable=None, **bar) as progress, closing(results):
        for encoded in results:
            raw = encoded.raw
            if encoded.error is not None:
                if not (config.skip_bad and raw.first and raw.last):
                    raise _bad_record(raw, encoded.error)
                tally.add_bad(raw.where, encoded.error)
            else:
                _write_one(encoded, writer)
                if raw.last:
                    tally.add(encoded)
            progress.update(raw.size if known else raw.last)
    return tally


def _write_one(encoded: Encoded, writer: StoreWriter) -> None:
    try:
        writer.append(encoded.ids, encoded.mask, encoded.text_bytes)
        if encoded.ends is not None:
            writer.end_document(encoded.ends)
    except ValueError as error:
        raise ValueError(f"{encoded.raw.where}: {error}") from None
