"""Records of files with a structure (JSON lines, JSON, CSV, parquet) and of the Hugging Face hub."""

import csv
from collections.abc import Iterator
from pathlib import Path

from rwkv_train.data.render import Columns
from rwkv_train.data.sources import Raw
from rwkv_train.files import BOM, BadJSON, numbered_lines, parse_json, quoted


def read_json(path: str, columns: Columns, notes: list[str]) -> Iterator[Raw]:
    """JSON lines, one array of records, one object that is a record, or one that holds a list of records among other
    things (which `notes` names). The text tells which of them it is, not the file's name."""
    with open(path, "rb") as file:
        filled = (line for _, line in numbered_lines(file) if line.strip())
        first, alone = next(filled, b""), next(filled, None) is None
    array = first.lstrip().startswith(b"[")
    whole = array and alone
    if not whole:
        try:
            value = parse_json(first.decode("utf-8"))
        except BadJSON as error:
            whole = array or error.unfinished
        except UnicodeDecodeError:
            whole = array
        else:
            whole = alone and isinstance(value, dict) and columns.detect(value) is None and bool(_lists(value))
    yield from _one_value(path, columns, notes) if whole else _json_lines(path)


def _json_lines(path: str) -> Iterator[Raw]:
    with open(path, "rb") as file:
        for number, line in numbered_lines(file):
            if line.strip():
                yield Raw(f"{path}:{number}", "json", line.rstrip(b"\r\n"), len(line))


def _one_value(path: str, columns: Columns, notes: list[str]) -> Iterator[Raw]:
    """The records of a file that is one array or one object."""
    data = Path(path).read_bytes().removeprefix(BOM)
    where, hint = path, "write the records one on each line, or as one array"
    try:
        value = parse_json(data.decode("utf-8"))
        if isinstance(value, dict) and columns.detect(value) is None:
            lists = _lists(value)
            if len(lists) != 1:
                found = f"of which {_listed(lists)} are lists of records" if lists else "none of them a list of records"
                raise ValueError(f"one object with the keys {_listed(value)}, {found}; {hint}")
            where, others = f"{path}: {lists[0]}", [name for name in value if name != lists[0]]
            unused = f", not used: {_listed(others)}" if others else ""
            notes.append(f"{path}: one object, its records are the list {quoted(lists[0])}{unused}")
            value = value[lists[0]]
    except UnicodeDecodeError as error:
        yield Raw(f"{path}:{1 + data.count(10, 0, error.start)}", "bad", "invalid UTF-8", len(data))
    except BadJSON as error:
        several = f"several JSON values over several lines; {hint}" if "Extra data" in str(error) else str(error)
        yield Raw(f"{path}:{error.line}", "bad", several, len(data))
    except ValueError as error:
        yield Raw(path, "bad", str(error), len(data))
    else:
        records = value if isinstance(value, list) else [value]
        for number, record in enumerate(records, 1):
            yield Raw(f"{where}: record {number}", "record", record, len(data) // len(records))


def _lists(value: dict) -> list[str]:
    """The keys of an object under which lists of records lie."""
    return [k for k, v in value.items() if isinstance(v, list) and v and all(isinstance(one, dict) for one in v)]


def _listed(names: list[str] | dict) -> str:
    return ", ".join(map(quoted, list(names)[:12])) + ", ..." * (len(names) > 12) or "none"


def read_csv(path: str) -> Iterator[Raw]:
    """CSV or TSV with a header line; quoted fields may hold newlines. One column may have no name, as the index that
    pandas writes."""
    csv.field_size_limit(2**31 - 1)
    size = 0

    def decoded() -> Iterator[str]:
        nonlocal size
        with open(path, "rb") as file:
            for _, line in numbered_lines(file):
                size += len(line)
                yield line.decode("utf-8", errors="surrogateescape")

    reader = csv.reader(decoded(), delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise ValueError(f"{path}:1: the header is bad CSV ({error}).") from None
    if header is None:
        return
    if not any(header) or len(set(header)) < len(header) or _has_bad_bytes(header):
        raise ValueError(f"{path}:1: the header {header!r:.200} must name every column, each name once.")
    while True:
        start, before = reader.line_num + 1, size
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Raw(f"{path}:{start}", "bad", f"bad CSV ({error})", size - before)
            continue
        if row is None:
            return
        if row:
            yield _row(f"{path}:{start}", header, row, size - before)


def _row(where: str, header: list[str], row: list[str], size: int) -> Raw:
    if len(row) != len(header):
        return Raw(where, "bad", f"{len(row)} fields, but the header names {len(header)}", size)
    if _has_bad_bytes(row):
        return Raw(where, "bad", "invalid UTF-8", size)
    return Raw(where, "record", dict(zip(header, row, strict=True)), size)


def _has_bad_bytes(row: list[str]) -> bool:
    """Whether the decoder had to escape bytes that are no UTF-8 (to U+DC80 and up)."""
    return any("\udc80" <= letter <= "\udcff" for value in row if not value.isascii() for letter in value)


def read_parquet(path: str) -> Iterator[Raw]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            size = Path(path).stat().st_size // max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Raw(f"{path}:{number}", "record", record, size)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}, after row {number}: damaged parquet ({error}). Copy it again.") from None


def read_hub(name: str) -> Iterator[Raw]:
    """NAME[@CONFIG][:SPLIT], the split "train" unless named."""
    import logging

    import datasets

    print(f"Asking the Hugging Face hub for {name} ...", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what it tries again is told once, below
    repository, _, split = name.partition(":")
    repository, _, config = repository.partition("@")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        hint = "Check the spelling (hub:NAME[@CONFIG][:SPLIT]) and the network, or give a file's path."
        raise ValueError(f"{name} is no file here, and not on the hub either ({error}). {hint}") from error
    for number, record in enumerate(rows, 1):
        yield Raw(f"hub:{name}:{number}", "record", record)
