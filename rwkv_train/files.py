"""Reading text as it was typed, and writing so that a crash leaves the old file or the new one, complete.

Every text that people give is read here: UTF-8, cut at line feeds alone (the separators U+2028, U+0085 and form feeds
that Python's splitlines knows stay inside their line), without the byte order mark that editors put before it.
"""

import codecs
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

BOM = codecs.BOM_UTF8
NAMED = 20  # names that a list of many shows
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def numbered_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of a file that is open in binary, without a byte order mark."""
    for number, line in enumerate(file, 1):
        yield number, line.removeprefix(BOM) if number == 1 else line


def typed_lines(stream: Iterable[str]) -> Iterator[str]:
    """The lines of standard input, each when it is there, without a byte order mark before the first."""
    for number, line in enumerate(stream):
        yield line if number else line.removeprefix("\ufeff")


def unescaped(line: str) -> str:
    """The text that was typed as one line: \\n in it is a line break, and a doubled backslash a backslash."""
    return re.sub(r"\\([n\\])", lambda found: "\n" if found[1] == "n" else "\\", line)


class BadJSON(ValueError):
    """What is wrong with a JSON text, in a few words.

    line: where in it, from 1. unfinished: whether it would be sound so far, if it only went on.
    """

    def __init__(self, what: str, line: int = 1, unfinished: bool = False):
        super().__init__(f"bad JSON ({what})")
        self.line, self.unfinished = line, unfinished


def parse_json(text: str) -> object:
    """The value that a JSON text is; BadJSON if it is none.

    NaN and Infinity are no JSON, but Python writes them where a value is missing: they are null. A key that stands
    twice in an object is refused, as one of the two would be lost.
    """
    try:
        return json.loads(text, parse_constant=lambda name: None, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        unfinished = error.pos >= len(text.rstrip())
        raise BadJSON(f"{error.msg} at column {error.colno}", error.lineno, unfinished) from None
    except RecursionError:
        raise BadJSON("nested too deeply") from None
    except BadJSON:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise BadJSON(str(error)) from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadJSON(f"the key {quoted(next(n for n in names if names.count(n) > 1))} stands twice in one object")
    return found


def quoted(name: str) -> str:
    """A name in quotes, in one line: what is no letter, sign or space is escaped, and a long one is cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[:60])
    return f'"{shown}{"..." * (len(name) > 60)}"'


def counted(names: Counter[str], what: str) -> str:
    """Names and how often they were there, most often first: "tools" (12 records), "id" (1 record)."""
    several = [f"{quoted(name)} ({count:,} {what}{'s' * (count > 1)})" for name, count in names.most_common(NAMED)]
    return ", ".join(several) + f" and {len(names) - NAMED:,} more" * (len(names) > NAMED)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file as it stands, without a byte order mark. ValueError, with file and line, if it is not
    UTF-8."""
    if Path(path).expanduser().is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    data = Path(path).expanduser().read_bytes().removeprefix(BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = "UTF-16" if data.startswith(UTF16) else f"invalid UTF-8 (byte {data[error.start]:#04x})"
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: {what}; save the file as UTF-8 text") from None


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """(number from 1, line without its end) of the lines of a UTF-8 file that are not blank; ValueError as above."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]


def read_yaml(path: str | Path) -> object:
    """The value of a YAML file. ValueError, with file and line, if it is none or a key stands twice in a mapping, of
    which YAML's readers keep the last without a word."""
    import yaml

    text = read_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        found = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path}:{error.problem_mark.line + 1}: no YAML ({error.problem})") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:  # as of a 13th month
        raise ValueError(f"{path}: no YAML ({error})") from None
    nodes = [root] if root is not None else []
    known = set()  # a node can stand in several places, even in itself
    for node in nodes:
        if id(node) in known:
            continue
        known.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise ValueError(f"{path}:{key.start_mark.line + 1}: the key {quoted(key.value)} stands twice")
                seen.add(str(key.value))
                nodes.append(value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    return found


def temporary_beside(target: Path) -> Path:
    """A new name in target's directory, so that renaming it to target is one step."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """write(PATH), then put that file in target's place: a crash leaves the old or the new one, complete."""
    temporary = temporary_beside(target)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except OSError as error:
        if error.filename == str(temporary):  # a name that nobody has given
            raise OSError(error.errno, error.strerror, str(target)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a directory cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
