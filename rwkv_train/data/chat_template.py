"""How chats are written, as Hugging Face folders say it: a program in Jinja, read as our `Template`.

A foreign one is a stranger's program, run in Jinja's sandbox and not for long. What it does is told by what it writes.
Our own are in chat_program.py.
"""

import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime

from rwkv_train.data.chat_program import to_jinja
from rwkv_train.data.known_templates import NAMED
from rwkv_train.data.templates import Template

LARGEST = 1 << 16  # bytes of a foreign program
LONGEST = 1_000_000  # lines of Python that it may run each time
ROLES = ("user", "assistant") * 3
ODD = " \n a \r\n \n\n b \n"  # a message that shows what is done to white space
Write = Callable[[list[dict], bool], str]  # messages, and whether to ask for a reply -> a chat


def from_jinja(program: str, tokens: dict[str, str], special: Sequence[str]) -> tuple[Template, list[str]]:
    """The Template that writes chats as a program does, and what of the program it does not say, each as a phrase.

    tokens: what the program finds under names such as "bos_token". special: names of the tokenizer's special tokens,
    which are plain text where we read text. Raises ValueError, to go on from "its chat template", if there is none.
    """
    if known := next((template for template in NAMED.values() if to_jinja(template) == program), None):
        return known, []
    write, notes = _writer(program, tokens), []
    start, forms = _forms(write)
    if start in special:
        notes.append(f"begins each chat with {start}, which is not written here")
    elif start:
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
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])  # one of these would fill the memory

        def call_binop(self, context, operator, left, right):
            raise jinja2.TemplateError(f"{operator} is not run here")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    if len(program.encode()) > LARGEST:
        raise ValueError(f"is larger than {LARGEST:,} bytes")
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    # transformers' mark around an assistant's words changes nothing of what is written
    program = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", program)
    program = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", program)
    try:
        compiled = sandbox.from_string(program)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"is no Jinja program ({error})") from None

    def write(messages: list[dict], ask: bool) -> str:
        try:
            with _Limited():
                return compiled.render(messages=messages, add_generation_prompt=ask, **tokens)
        except Exception as error:  # whatever a program can raise
            raise ValueError(f"cannot be run here ({type(error).__name__}: {error})") from None

    return write


class _Limited:
    """Ends what runs within it after LONGEST lines."""

    def __enter__(self) -> None:
        self._left, self._before = LONGEST, sys.gettrace()
        sys.settrace(self._count)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _count(self, *_: object) -> Callable:
        self._left -= 1
        if self._left < 0:
            raise TimeoutError(f"more than {LONGEST:,} lines")
        return self._count
