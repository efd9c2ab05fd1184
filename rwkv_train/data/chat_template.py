"""How chats are written, as Hugging Face folders say it: a program in Jinja, read as our `Template`.

A foreign one is a stranger's program. It is run by Jinja's sandbox in a process of its own, which may take only so much
time and memory, and what it does is told by what it writes. Our own are in chat_program.py.
"""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from rwkv_train.data.chat_program import to_jinja
from rwkv_train.data.known_templates import NAMED
from rwkv_train.data.templates import THINKING, Template

LARGEST = 1 << 16  # characters of a foreign program, and of a chat that it writes
SECONDS = 10  # of one core; three times that by the clock
MEMORY = 1 << 30  # bytes
TOO_MUCH = "takes too much time or memory"
BEGINS = ("bos_token", "''")  # what our own programs begin with
ROLES = ("user", "assistant") * 3
ODD = " \n a \r\n \n\n b \n"  # a message that shows what is done to white space
Write = Callable[[list[dict], bool], str]  # messages, and whether to ask for a reply -> a chat


def from_jinja(
    program: str, tokens: dict[str, str], special: Sequence[str], end: str = ""
) -> tuple[Template, list[str]]:
    """The Template that writes chats as a program does, and what of the program it does not say, each as a phrase.

    tokens: what the program finds under names such as "bos_token". special: names of the tokenizer's special tokens,
    which are plain text where we read text; end: that of the end of a document, with which chats begin here. Raises
    ValueError, to go on from "its chat template", if there is none.
    """
    if known := _known(program):
        return known, []
    if len(program) > LARGEST:
        raise ValueError(f"is longer than {LARGEST:,} characters")
    asked = json.dumps({"program": program, "tokens": tokens, "special": list(special), "end": end})
    command = (sys.executable, "-P", "-m", __name__, str(SECONDS))
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=3 * SECONDS, env=os.environ | path
        )
    except subprocess.TimeoutExpired:
        raise ValueError(TOO_MUCH) from None
    except OSError as error:
        raise ValueError(f"cannot be run here ({error})") from None
    if done.returncode < 0:  # ended by the system
        raise ValueError(TOO_MUCH)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"cannot be run here ({why:.200})")
    said = json.loads(done.stdout)
    if "refused" in said:
        raise ValueError(said["refused"])
    return Template(**said["template"]), said["notes"]


def _known(program: str) -> Template | None:
    """The template of NAMED, in any mode of thinking, of which a program is ours."""
    for template, begin in itertools.product(NAMED.values(), BEGINS):
        for thinking in THINKING if template.thinks else ("off",):
            if to_jinja(found := replace(template, thinking=thinking), begin) == program:
                return found
    return None


def told_by_running(program: str, tokens: dict, special: Sequence[str], end: str) -> tuple[Template, list[str]]:
    """What `from_jinja` says, in this process and as long as it takes."""
    write, notes = _writer(program, tokens), []
    start, forms = _forms(write)
    if start in special and start != end:
        notes.append(f"begins each chat with {start}, which is not written here")
    elif start and start != end:
        raise ValueError(f"begins each chat with a text of its own, {start!r:.80}")
    if system := _system_form(write, start, forms["user"]):
        forms = {"system": system} | forms
    else:
        notes.append("does not write system messages as messages of their own")
    for name in special:
        if any(name in form for form in forms.values()):
            raise ValueError(f"writes the special token {name}, and names of these are plain text here")
    template = Template(forms)
    odd = [{"role": "user", "content": ODD}]
    if write(odd, False) != start + _text(template, odd):
        template.collapse_blank_lines = False
        if write(odd, False) != start + _text(template, odd):
            notes.append("changes white space in messages, which stays as it is here")
    _check(write, template, start)
    chat = [{"role": "user", "content": "x"}]
    asked, ours = write(chat, True), start + "".join(template.prompt(chat))
    if more := asked.removeprefix(ours).rstrip() if asked != write(chat, False) else "":
        if not asked.startswith(ours):
            raise ValueError("asks for a reply otherwise than it writes one")
        notes.append(f"goes on with {more!r:.80} where it asks for a reply, which is not written here")
    return template, notes


def _forms(write: Write) -> tuple[str, dict[str, str]]:
    """What begins a chat, and how each role's messages are written: by what one more message adds to the text."""
    chat = [{"role": role, "content": f"qz{n}zq"} for n, role in enumerate(ROLES)]
    texts = ["", *(write(chat[:n], False) for n in range(1, len(chat) + 1))]
    added = []
    for message, before, after in zip(chat, texts, texts[1:], strict=False):
        added.append(after.removeprefix(before).replace(message["content"], "{content}"))
        if not after.startswith(before) or added[-1].count("{content}") != 1:
            raise ValueError("does not write one message after the other, each with its content")
    forms = dict(zip(ROLES[2:], added[2:], strict=True))
    start = added[0].removesuffix(forms["user"])
    if added != [start + forms["user"], *(forms[role] for role in ROLES[1:])]:
        raise ValueError("writes messages of one role otherwise by where they stand")
    return start, forms


def _system_form(write: Write, start: str, user: str) -> str | None:
    """How a system message before a user's is written; None if it is not, or not as a message of its own."""
    try:
        text = write([{"role": "system", "content": "qz0zq"}, {"role": "user", "content": "qz1zq"}], False)
    except ValueError:
        return None
    form = text.removeprefix(start).removesuffix(user.replace("{content}", "qz1zq")).replace("qz0zq", "{content}")
    alike = text == start + form.replace("{content}", "qz0zq") + user.replace("{content}", "qz1zq")
    return form if alike and form.count("{content}") == 1 else None


def _check(write: Write, template: Template, start: str) -> None:
    """ValueError unless a longer chat than those that it was told by is written alike."""
    roles = (*[role for role in template.roles if role == "system"], *ROLES, *ROLES)
    chat = [{"role": role, "content": f"Wörter: {n}, \U0001f600"} for n, role in enumerate(roles)]
    if write(chat, False) != start + _text(template, chat):
        raise ValueError("writes a longer chat otherwise than its first messages")


def _text(template: Template, chat: list[dict]) -> str:
    return "".join(text for text, _ in template.segments(chat))


def _writer(program: str, tokens: dict[str, str]) -> Write:
    """What runs the program as transformers would."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    # transformers' mark around an assistant's words changes nothing of what is written
    program = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", program)
    program = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", program)
    try:
        compiled = sandbox.from_string(program)
    except MemoryError:
        raise
    except Exception as error:  # Python's own for what Jinja makes of it, too
        raise ValueError(f"is no Jinja program ({type(error).__name__}: {error!s:.200})") from None

    def write(messages: list[dict], ask: bool) -> str:
        try:
            text = compiled.render(messages=messages, add_generation_prompt=ask, **tokens)
        except MemoryError:
            raise
        except Exception as error:  # whatever a program can raise
            raise ValueError(f"cannot be run here ({type(error).__name__}: {error!s:.200})") from None
        if len(text) > LARGEST:
            raise ValueError(f"writes more than {LARGEST:,} characters")
        return text

    return write


def _limit_this_process(seconds: int) -> None:
    """Time and memory, on platforms that have such limits; others have the clock of `from_jinja` alone."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in (("RLIMIT_CORE", 0), ("RLIMIT_CPU", seconds), ("RLIMIT_AS", MEMORY)):
        with contextlib.suppress(ValueError, OSError):  # it has a lower one, or the platform has none
            resource.setrlimit(getattr(resource, kind), (most, most))


def main() -> None:
    """The process that `from_jinja` starts: a request as JSON from standard input, what is told of it to the other."""
    _limit_this_process(int(sys.argv[1]))
    try:
        template, notes = told_by_running(**json.load(sys.stdin))
        said = {"template": template.as_dict(), "notes": notes}
    except ValueError as error:
        said = {"refused": str(error)}
    except MemoryError:
        said = {"refused": TOO_MUCH}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
