"""Replies that must be JSON: which ids may come next, by the library llguidance.

A grammar is one of bytes. At every token the library walks a trie of all ids' bytes and says which of them the text so
far may go on with; whether a token ends in the middle of a character makes no difference to it.

White space between JSON's parts is at most one space, as Python's json writes it: a model that loves white space cannot
go on with it for ever, or end its turn by it. There is none before or after.
The text may be split into ids in any way. (The library would force the tokenizer's own ids wherever the grammar
leaves one text alone; it first spells that text out, which for the pattern `^a{1000000000}$` never ends.)

Limits. Those of the library bound the work of one token and the memory of one sequence (at most 25 MB were seen). They
do not bound reading a schema, which may take minutes or overflow the stack and end the process, so `checked` bounds the
schema's size and whatever in it was seen to do that. What passes is read within about a second, most in 2 ms.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from decimal import Decimal

import numpy as np
import torch

from rwkv_train.tokenizer import Tokenizer

WHITE_SPACE = r"[ ]"
EXTENSION = "x-guidance"  # a key of a schema that changes the library's syntax of JSON; ours alone may
MAX_SCHEMA = 32_768  # characters of JSON
MAX_REFERENCES = 256  # a chain of 1500 overflows the stack
MAX_PATTERNED = 50  # pairs of them are compared
MAX_COUNTED = 100  # properties, where their number is limited: the grammar grows with the square
MAX_MULTIPLE = 20_000  # states of the machine that divides, at 8 microseconds each
SEARCH_SECONDS = 0.3  # for the place of what is refused
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "additionalItems", "propertyNames", "contains", "not", "if", "then", "else")


class Grammars:
    """What compiles constraints for one tokenizer; building it takes 0.2 s for 65,536 ids.

    `vocab_size` is V, the width of the logits, at least the tokenizer's. Safe to use from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        from llguidance import LLParserLimits, LLTokenizer

        assert vocab_size >= tokenizer.vocab_size, (vocab_size, tokenizer.vocab_size)
        self._vocab_size, self._eod = vocab_size, tokenizer.eod
        self._tokenizer = LLTokenizer(_Vocabulary(tokenizer, vocab_size), slices=LLTokenizer.json_slices())
        self._limits = LLParserLimits(
            max_items_in_row=10_000,  # of an object, some 2500 properties that may all be left out
            max_lexer_states=20_000,  # 1 to 2 kB each
            max_grammar_size=200_000,
            initial_lexer_fuel=500_000,
            verbose_errors=False,  # they would hold the whole schema
        )

    def json_object(self) -> "Constraint":
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict) -> "Constraint":
        """What JSON Schema (draft 2020-12) says; properties come in the schema's order.

        Raises ValueError, one line, if the library or a limit refuses the schema, or no text can satisfy it.
        """
        from llguidance import LLMatcher

        grammar = _grammar(checked(schema))
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            why = _line(matcher.get_error())
            raise ValueError(f"The schema cannot be followed at {self._place(schema, why)}: {why}")
        constraint = Constraint(matcher, self._vocab_size, self._eod)
        constraint.mask()  # raises where no text can begin
        return constraint

    def _place(self, schema: dict, why: str) -> str:
        """The JSON pointer of the innermost schema that is refused for the same reason."""
        from llguidance import LLMatcher

        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        place, inner, until = "#", _children(schema), time.monotonic() + SEARCH_SECONDS
        while time.monotonic() < until and (child := next(inner, None)):
            grammar = _grammar(json.dumps(shared | child[1]))
            if _line(LLMatcher.validate_grammar(grammar, self._tokenizer, limits=self._limits)) == why:
                place, inner = place + child[0], _children(child[1])
        place = json.dumps(place, ensure_ascii=False)[1:-1]  # a name may hold a line break
        return place if len(place) < 150 else f"...{place[-150:]}"


class Constraint:
    """How far one sequence has come in its grammar. Not for two threads at once."""

    def __init__(self, matcher, vocab_size: int, eod: int) -> None:
        self._matcher, self._vocab_size, self._eod = matcher, vocab_size, eod

    def mask(self) -> torch.Tensor:
        """bool [V] on the CPU: the ids that may come next; the end of document if and only if `complete`.

        Raises ValueError if the grammar has become more complex than the limits allow; the sequence cannot go on.
        """
        packed = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError(f"The schema cannot be followed from here: {_line(self._matcher.get_error())}")
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))

    def accept(self, token: int) -> None:
        """Go on by a token that `mask` allows.

        Raises ValueError for any other, and where a limit is reached; the sequence cannot go on.
        """
        if self.ended or not self._matcher.consume_token(token):
            why = _line(self._matcher.get_error()) or "the text has ended"
            raise ValueError(f"The schema cannot be followed past token {token}: {why}")

    @property
    def complete(self) -> bool:
        """Whether the text so far is a whole one: the end may come now."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    @property
    def ended(self) -> bool:
        """Whether the text is whole and nothing may follow, or its end was accepted."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> "Constraint":
        """Another sequence that has come as far, and goes on by itself."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size, self._eod)


class _Vocabulary:
    """A tokenizer as the library asks for it. An id with no bytes is never allowed."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        # To the library, bytes that begin with 255 name a special token. No UTF-8 holds that byte: nothing is lost.
        text = [b"" if token.startswith(b"\xff") else token for token in tokenizer.table]
        self.tokens = text + [b""] * (vocab_size - len(text))
        self.tokens[tokenizer.eod] = b"\xff<end>"
        self.eos_token_id = tokenizer.eod
        self.special_token_ids = [tokenizer.eod]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def checked(schema: dict) -> str:
    """The schema as JSON. Raises ValueError, one line, if it is none or one that takes too much to read."""
    if not isinstance(schema, dict):
        raise ValueError(f"The schema must be an object, not {type(schema).__name__}.")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The schema is no JSON: {error}.") from None
    if len(text) > MAX_SCHEMA:
        raise ValueError(f"The schema has {len(text)} characters; at most {MAX_SCHEMA} are read. Make it smaller.")
    if EXTENSION in schema:
        raise ValueError(f"The schema cannot be followed at #: {EXTENSION} is no keyword of JSON Schema; remove it.")
    met = list(_pairs(schema))
    named = {key: sum(len(v) for k, v in met if k == key and isinstance(v, dict)) for key in NAMED}
    counts = any(key in ("minProperties", "maxProperties") for key, _ in met)
    multiples = [_digits(value) for key, value in met if key == "multipleOf" and type(value) in (int, float) and value]
    for what, number, most in (
        ("references ($ref)", sum(key == "$ref" for key, _ in met), MAX_REFERENCES),
        ("patternProperties", named["patternProperties"], MAX_PATTERNED),
        ("properties beside minProperties or maxProperties", named["properties"] * counts, MAX_COUNTED),
        (
            "for multipleOf (their least common multiple, times their number)",
            math.lcm(*multiples) * len(multiples),
            MAX_MULTIPLE,
        ),
    ):
        if number > most:
            raise ValueError(f"The schema is too complex: more than {most} {what}. Make it smaller.")
    return text


def _pairs(schema: object) -> Iterator[tuple[str, object]]:
    """All keys and their values, at any depth."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield from part.items()
        left += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _digits(number: int | float) -> int:
    """Of 0.15, 15: the library divides by that, and the point costs it nothing."""
    _, digits, exponent = Decimal(str(number)).as_tuple()
    return int("".join(map(str, digits))) * 10 ** max(exponent, 0)


def _grammar(schema: str) -> str:
    """In the library's own format; `schema` is JSON, which it reads up to its last brace whatever its texts hold."""
    ours = {"whitespace_pattern": WHITE_SPACE, "lenient": False, "coerce_one_of": False}
    rest = f", {schema[1:]}" if schema != "{}" else "}"
    return f'%llguidance {{"no_forcing": true}}\nstart: %json {{"{EXTENSION}": {json.dumps(ours)}{rest}\n'


def _children(schema: dict) -> Iterator[tuple[str, dict]]:
    """(end of the JSON pointer, schema) of the schemas directly inside one."""
    for key, value in schema.items():
        inside = {"": value} if key in SINGLE else value if key in NAMED else ()
        if key in LISTED and isinstance(value, list):
            inside = dict(enumerate(value))
        for name, child in inside.items() if isinstance(inside, dict) else ():
            if isinstance(child, dict):
                step = str(name).replace("~", "~0").replace("/", "~1")
                yield f"/{key}" + (f"/{step}" if key not in SINGLE else ""), child


def _line(error: str) -> str:
    """What the library says, as one line of at most 200 characters."""
    text = re.sub(r"^at \d+\(\d+\): ", "", error).removeprefix("failed to compile JSON schema: ")
    text = text.split("\n   1 | %llguidance")[0].replace("<non-verbose/>", "")
    if text.startswith("regex parse error"):
        return "pattern: " + text.rpartition("error: ")[2].strip()[:190]
    if text.startswith("oneOf constraints"):
        return "oneOf is followed only where no two of its options can both match; use anyOf"
    line = text.partition("\n")[0].strip().replace("NoExtensionBias", "no token can begin or continue such a text")
    return line.replace("Unimplemented keys", "these keywords are not supported")[:200]
