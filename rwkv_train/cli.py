"""The command line. A command's module is imported only when that command runs, so that help comes at once."""

import io
import json
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin

from rwkv_train import program
from rwkv_train.command_config import ChatConfig as ChatConfig  # for those who open a chat from Python
from rwkv_train.command_config import explained
from rwkv_train.config import RENAMED, renamed
from rwkv_train.files import read_yaml

try:
    from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a setting's help stands under it
except ImportError:  # a bare machine with torch and a GPU, where `bench gpu` runs all the same
    from argparse import ArgumentParser


@dataclass(frozen=True)
class Command:
    """One command: its phrase in the overview, and "module:name" of its settings and of what runs it."""

    phrase: str
    config: str
    run: str
    positional: str | None = None  # the setting that needs no flag
    extend: Callable[[ArgumentParser], object] = lambda parser: None  # flags that are no settings


def _add_resume(parser: ArgumentParser) -> None:
    explained = "continue the run called NAME from its newest checkpoint, or from the one given"
    parser.add_argument("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help=explained)


def _add_gpus(parser: ArgumentParser) -> None:
    explained = "numbers of GPUs, as 8 16 32: a table of how they could share the lanes of this run"
    parser.add_argument("--gpus", nargs="+", type=int, help=explained)


def _bench(what: str, phrase: str) -> Command:
    return Command(phrase, f"rwkv_train.bench.settings:{what.title()}Bench", f"rwkv_train.bench.{what}:{what}")


COMMANDS = {  # most are one word, the benchmarks two
    "prepare": Command(
        "turn text, chats or a data set into a token store",
        "rwkv_train.data.prepare:PrepareConfig",
        "rwkv_train.data.prepare:prepare",
        positional="sources",
    ),
    "fit": Command(
        "train a model on a token store",
        "rwkv_train.config:FitConfig",
        "rwkv_train.train.fit:fit",
        extend=_add_resume,
    ),
    "plan": Command(
        "tell whether a run would fit, and how long it would take",
        "rwkv_train.plan.settings:PlanConfig",
        "rwkv_train.plan.command:plan",
        extend=_add_gpus,
    ),
    "validate": Command(
        "score a model: perplexity, bits per byte, loss by position in the document",
        "rwkv_train.command_config:ValidateConfig",
        "rwkv_train.commands:validate",
    ),
    "generate": Command(
        "write a continuation of one prompt or of many",
        "rwkv_train.command_config:GenerateConfig",
        "rwkv_train.commands:generate",
    ),
    "report": Command(
        "write a run's curves, samples and settings as one HTML page",
        "rwkv_train.command_config:ReportConfig",
        "rwkv_train.train.report:report",
        positional="run",
    ),
    "inspect": Command(
        "print the exact batch of one step of a run",
        "rwkv_train.command_config:InspectConfig",
        "rwkv_train.commands:inspect",
    ),
    "chat": Command(
        "talk to a model in the terminal", "rwkv_train.command_config:ChatConfig", "rwkv_train.chat.command:chat"
    ),
    "serve": Command(
        "serve a model: an OpenAI-like API, corrections, and a page to talk and correct on",
        "rwkv_train.serve.settings:ServeConfig",
        "rwkv_train.serve:serve",
    ),
    "feedback": Command(
        "learn a file of corrections",
        "rwkv_train.command_config:FeedbackFileConfig",
        "rwkv_train.chat.corrections_file:feedback",
    ),
    "bench wkv": _bench("wkv", "time the WKV operator's backends beside peers'"),
    "bench train": _bench("train", "time a training step beside transformers and its bare matrix products"),
    "bench memory": _bench("memory", "draw training memory by length of the text, beside transformers"),
    "bench generate": _bench("generate", "time generation beside the package rwkv and transformers"),
    "bench gpu": _bench("gpu", "check and time everything that runs on a GPU"),
    "bench serve": _bench("serve", "load a server: many sessions, while corrections are learnt, beside rwkvserve"),
    "bench feedback": _bench("feedback", "measure corrections: learnt, kept, understood, and all else left alone?"),
    "export": Command(
        "write a model as .pth, .safetensors or a Hugging Face folder",
        "rwkv_train.command_config:ExportConfig",
        "rwkv_train.commands:export",
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with its code: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by a signal."""
    argv = sys.argv[1:] if argv is None else argv
    program.let_threads_sleep()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that the terminal cannot show is escaped, and not the end
        sys.stdout.reconfigure(errors="backslashreplace")
    words = next((n for n in (2, 1) if " ".join(argv[:n]) in COMMANDS), 0)
    if not words:
        sys.exit(_overview(argv))
    name = " ".join(argv[:words])
    try:
        config, extra = parse(name, argv[words:])
        code = _find(COMMANDS[name].run)(config, **extra)
        _leave(code if isinstance(code, int) else 0)
    except (
        ValueError,
        OSError,
    ) as e:  # people's mistakes and their machine's; anything else is a bug and shows itself
        print(f"{program.name()} {name}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _leave(code: int) -> None:
    """Exit. One of several ranks skips Python's teardown: FSDP and DeepSpeed keep groups of ranks alive for ever, and
    where one of gloo's threads asks for the interpreter during the teardown, the process aborts."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun and Lightning's launcher set it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _overview(argv: list[str]) -> int:
    group = [argv[0]] if any(name.startswith(f"{' '.join(argv[:1])} ") for name in COMMANDS) else []
    rest = argv[len(group) :]
    wanted = bool(rest) and rest[0] in ("-h", "--help", "help")
    out = sys.stdout if wanted else sys.stderr
    if rest and not wanted:
        print(f"{program.name()}: there is no command {' '.join([*group, rest[0]])!r}. The commands are:", file=out)
    elif not group:
        usage = f"usage: {program.command('COMMAND')} ..."
        print(f"Online fine-tuning trainer for RWKV language models.\n\n{usage}\n", file=out)
    for name, command in COMMANDS.items():
        if name.split()[: len(group)] == group:
            print(f"  {name:<16}{command.phrase}", file=out)
    print(f"\n{program.command('COMMAND', '--help')} explains a command's flags.", file=out)
    return 0 if wanted else 2


def parse(name: str, argv: list[str]) -> tuple[object, dict]:
    """(settings, flags that are no settings) of one command's arguments. Unknown ones end the program, code 2."""
    command = COMMANDS[name]
    config = _find(command.config)
    parser = _Parser(
        prog=f"{program.name()} {name}", description=f"{config.__doc__.split(chr(10))[0]}", allow_abbrev=False
    )
    if not hasattr(parser, "add_class_arguments"):
        return _parse_flat(parser, name, argv), {}
    _read_old_names(parser)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    command.extend(parser)
    parser.add_class_arguments(config, as_group=False, skip={command.positional} - {None})
    if command.positional:
        parser.add_argument(command.positional, nargs="+", type=str, help=explained(config, command.positional))
    argv = _with_found_config(_spelled_out(config, argv))
    try:
        for flag, file in pairwise(argv):
            # The parser would tell what is wrong without the file's name, or not at all.
            if flag == "--config" and Path(file).is_file() and not isinstance(read_yaml(file), dict):
                raise ValueError(f"{file} holds no settings; write them as NAME: VALUE")
    except ValueError as error:
        parser.error(error)
    found = vars(parser.instantiate(parser.parse_args(argv)))
    settings = {field: found.pop(field) for field in config.__dataclass_fields__}
    found.pop("config")
    return config(**settings), found


def _parse_flat(parser: ArgumentParser, name: str, argv: list[str]) -> object:
    """The settings of a benchmark, which are plain values, read by Python alone: --name=JSON or --name=text."""
    if not name.startswith("bench"):
        raise ValueError("this command needs packages that are not here: pip install rwkv_train")
    config = _find(COMMANDS[name].config)
    for f in fields(config):
        parser.add_argument(f"--{f.name}", type=_value, default=SUPPRESS, help=explained(config, f.name))
    given = vars(parser.parse_args(_spelled_out(config, argv)))
    for f in fields(config):
        if f.name in given and not _fits(given[f.name], f.type):
            kind = f.type.__name__ if isinstance(f.type, type) else str(f.type).replace("typing.", "")
            parser.error(f"--{f.name}={json.dumps(given[f.name])} is no {kind}; write a value of that kind, as in JSON")
    return config(**given)


def _fits(value: object, kind) -> bool:
    """Whether a value is of the type of a benchmark's setting."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(x, *get_args(kind)) for x in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(_fits(value, one) for one in get_args(kind))
    return type(value) is kind or (type(value) is int and kind is float)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Parser(ArgumentParser):
    """Errors in one line; help with hyphens, as flags are written (YAML keys keep their underscores)."""

    def error(self, message, ex=None):
        print(f"{self.prog}: {' '.join(str(message).split())} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def format_help(self):
        return re.sub(r"--[a-z][a-z_.]*", lambda flag: flag[0].replace("_", "-"), super().format_help())


def _read_old_names(parser: ArgumentParser) -> None:
    """Settings in YAML may have the names of before, as in the config.yaml of an old run."""
    from yaml import YAMLError

    load = get_loader("yaml")

    def load_settings(text: str):
        found = load(text)
        if not isinstance(found, dict):
            return found
        if isinstance(asked := found.get("thinking"), bool):  # what on and off are in YAML
            found["thinking"] = "on" if asked else "off"
        return renamed(found)

    set_loader("settings", load_settings, (YAMLError, ValueError))
    parser.parser_mode = "settings"


def _todays_flags(argv: list[str]) -> list[str]:
    """Flags by their names of today. ValueError where one is given under both its names."""
    flags = {a.partition("=")[0][2:] for a in argv if a.startswith("--")}
    for old, new in RENAMED.items():
        if {old, new} <= flags:
            raise ValueError(f"--{old} is the old name of --{new}, and both are given; drop --{old}")
        argv = ["--" + new + a[2 + len(old) :] if a.partition("=")[0] == f"--{old}" else a for a in argv]
    return argv


def _spelled_out(config: type, argv: list[str]) -> list[str]:
    """Flags as the parser knows them: with underscores, and a yes-or-no flag on its own as --plain=true."""
    argv = _todays_flags([_underscored(a) for a in argv])
    argv = _as_lists({f"--{f.name}" for f in fields(config) if f.metadata.get("texts")}, argv)
    switches = {f.name for f in fields(config) if f.type is bool}
    bare = [a[2:] in switches and n not in ("true", "false") for a, n in zip(argv, [*argv, ""][1:], strict=True)]
    return [a + "=true" * alone for a, alone in zip(argv, bare, strict=True)]


def _as_lists(flags: set[str], argv: list[str]) -> list[str]:
    """Flags that are given once for each text, as the parser takes them; a JSON list of texts is one already."""
    found, seen = [], set()
    while argv:
        word, *argv = argv
        flag, equals, text = word.partition("=")
        name = flag.removesuffix("+")
        if name in flags and not equals and argv and not argv[0].startswith("--"):
            equals, (text, *argv) = "=", argv
        if name in flags and equals:
            texts, more = _value(text), flag != name or name in seen
            is_list = isinstance(texts, list) and all(isinstance(each, str) for each in texts)
            word = f"{name}{'+' * more}={json.dumps(texts if is_list else [text])}"
            seen.add(name)
        found.append(word)
    return found


def _with_found_config(argv: list[str]) -> list[str]:
    """The same where --config names a file that comes along, or a run, whose paths are found from where it lies."""
    argv = [word for a in argv for word in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" not in argv[:-1]:
        return argv
    at = argv.index("--config") + 1
    file, shipped = Path(argv[at]), program.shipped_config(argv[at])
    if not file.exists() and shipped:
        print(f"{file} is not in this folder; taking the one that comes along, {shipped}", file=sys.stderr)
        argv[at] = str(shipped)
    from rwkv_train.run_config import found_paths, is_run_config

    if is_run_config(file):
        given = tuple(a[2:].partition("=")[0] for a in argv if a.startswith("--"))
        argv[at + 1 : at + 1] = [f"--{flag}={value}" for flag, value in found_paths(file, given).items()]
    return argv


def _underscored(argument: str) -> str:
    """--val-share as --val_share; values and everything else stay as they are."""
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else argument


def _find(name: str):
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
