"""The command line. A command's module is imported only when that command runs, so that help comes at once."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from jsonargparse import ArgumentParser


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
class ExportConfig:
    """Write a model in another format.

    Args:
        model: checkpoint or runs/NAME
        out: NAME.pth (RWKV-LM, ChatRWKV), NAME.safetensors, or a folder (Hugging Face)
        dtype: number format of the weights; that of the model if not given
    """

    model: str
    out: str
    dtype: Literal["fp32", "fp16", "bf16"] | None = None


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


COMMANDS = {
    "prepare": Command(
        "turn text, chats or a data set into a token store",
        "rwkv_train.data.prepare:PrepareConfig",
        "rwkv_train.data.prepare:prepare",
        positional="sources",
    ),
    "fit": Command(
        "train a model on a token store",
        "rwkv_train.config:FitConfig",
        "rwkv_train.fit:fit",
        extend=_add_resume,
    ),
    "validate": Command(
        "score a model: perplexity, bits per byte, loss by position in the document",
        "rwkv_train.cli:ValidateConfig",
        "rwkv_train.commands:validate",
    ),
    "generate": Command(
        "write a continuation of a prompt", "rwkv_train.cli:GenerateConfig", "rwkv_train.commands:generate"
    ),
    "export": Command(
        "write a model as .pth, .safetensors or a Hugging Face folder",
        "rwkv_train.cli:ExportConfig",
        "rwkv_train.commands:export",
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with its code: 0 done, 1 failed, 2 wrong usage, 130 or 143 stopped by a signal."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        sys.exit(_overview(argv))
    name = argv[0]
    try:
        config, extra = parse(name, argv[1:])
        code = _find(COMMANDS[name].run)(config, **extra)
        sys.exit(code if isinstance(code, int) else 0)
    except (
        ValueError,
        OSError,
    ) as e:  # people's mistakes and their machine's; anything else is a bug and shows itself
        print(f"train.py {name}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _overview(argv: list[str]) -> int:
    wanted = bool(argv) and argv[0] in ("-h", "--help", "help")
    out = sys.stdout if wanted else sys.stderr
    if argv and not wanted:
        print(f"train.py: there is no command {argv[0]!r}. The commands are:", file=out)
    else:
        print(
            "Online fine-tuning trainer for RWKV language models.\n\nusage: python train.py COMMAND ...\n",
            file=out,
        )
    for name, command in COMMANDS.items():
        print(f"  {name:<10}{command.phrase}", file=out)
    print("\npython train.py COMMAND --help explains a command's flags.", file=out)
    return 0 if wanted else 2


def parse(name: str, argv: list[str]) -> tuple[object, dict]:
    """(settings, flags that are no settings) of one command's arguments. Unknown ones end the program, code 2."""
    command = COMMANDS[name]
    config = _find(command.config)
    parser = _Parser(prog=f"train.py {name}", description=f"{config.__doc__.split(chr(10))[0]}", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    command.extend(parser)
    parser.add_class_arguments(config, as_group=False, skip={command.positional} - {None})
    if command.positional:
        parser.add_argument(command.positional, nargs="+", type=str, help=_phrase(config, command.positional))
    found = vars(parser.instantiate(parser.parse_args([_underscored(a) for a in argv])))
    settings = {field: found.pop(field) for field in config.__dataclass_fields__}
    found.pop("config")
    return config(**settings), found


class _Parser(ArgumentParser):
    """Errors in one line; help with hyphens, as flags are written (YAML keys keep their underscores)."""

    def error(self, message, ex=None):
        print(f"{self.prog}: {' '.join(str(message).split())} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def format_help(self):
        return re.sub(r"--[a-z][a-z_.]*", lambda flag: flag[0].replace("_", "-"), super().format_help())


def _underscored(argument: str) -> str:
    """--val-share as --val_share; values and everything else stay as they are."""
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else argument


def _phrase(config: type, field: str) -> str:
    """A setting's explanation, from the docstring."""
    found = re.search(rf"^\s+{field}: (.*?)(?=^\s+\w+: |\Z)", config.__doc__, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split())


def _find(name: str):
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
