"""Constrained texts: whatever is chosen among the allowed ids is JSON of the schema, and ends where it may."""

import functools
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.program import STARTER
from rwkv_train.serve.grammar import MAX_SCHEMA, Constraint, Grammars
from rwkv_train.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("llguidance")
TOKENIZERS = ["bytes", "world", "starter"]
WIDER = 7  # logits wider than the tokenizer


@functools.cache
def made(name: str) -> tuple[Tokenizer, Grammars]:
    tokenizer = load_tokenizer(STARTER / "tokenizer.json" if name == "starter" else name)
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size + WIDER)


def allowed(constraint: Constraint) -> list[int]:
    return constraint.mask().nonzero().flatten().tolist()


def in_string(text: bytes) -> bool:
    return text.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"') % 2 == 1


@functools.cache
def has_text(name: str) -> torch.Tensor:
    """bool [V]: ids that stand for bytes, the end of document aside."""
    tokenizer, _ = made(name)
    return torch.tensor([bool(token) for token in tokenizer.table] + [False] * WIDER).index_fill(
        0, torch.tensor(tokenizer.eod), False
    )


def nearest_to_the_end(text: bytes, mask: torch.Tensor, tokenizer: Tokenizer) -> int:
    """An id that closes what is open, or else one that opens as little as there is."""
    order = '"' if in_string(text) else '}],:n01-"'
    ids = [tokenizer.encode(letter)[0] for letter in order]
    return next((i for i in ids if mask[i]), int(mask.int().argmax()))


def written(constraint: Constraint, name: str, seed: int, freely: int = 25) -> bytes:
    """A text of ids taken at random, and then of those that lead to its end."""
    (tokenizer, _), rng, ids = made(name), random.Random(seed), []
    for n in range(2000):
        mask = constraint.mask()
        assert mask.shape == (tokenizer.vocab_size + WIDER,) and mask.dtype == torch.bool
        assert bool(mask[tokenizer.eod]) == constraint.complete
        mask[tokenizer.eod] = False
        assert not (mask & ~has_text(name)).any() and constraint.ended == (not mask.any())
        text = tokenizer.decode_bytes(ids)
        if constraint.complete and (constraint.ended or n >= freely or rng.random() < 0.3):
            return text
        may = mask.nonzero()
        ids.append(int(may[rng.randrange(len(may))]) if n < freely else nearest_to_the_end(text, mask, tokenizer))
        constraint.accept(ids[-1])
    raise AssertionError(f"no end: {tokenizer.decode_bytes(ids)}")


def satisfies(value: object, schema: dict) -> bool:
    """JSON Schema, as far as `schemas` below goes."""
    if "anyOf" in schema:
        return any(satisfies(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        inner = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value)
            and (schema["additionalProperties"] or set(value) <= set(inner))
            and all(satisfies(value[name], inner[name]) for name in inner if name in value)
        )
    if kind == "array":
        size = isinstance(value, list) and schema["minItems"] <= len(value) <= schema.get("maxItems", len(value))
        return size and all(satisfies(item, schema["items"]) for item in value)
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return type(value) in {"number": (int, float), "boolean": (bool,), "null": (type(None),)}[kind]


def objects(inner):
    fields = st.dictionaries(st.sampled_from(["a", "name", 'q"\\', "ключ", "a b"]), inner, max_size=3)
    return fields.flatmap(
        lambda properties: st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.just(properties),
                "required": st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([]),
                "additionalProperties": st.booleans(),
            }
        )
    )


def arrays(inner):
    sizes = st.sampled_from([{"minItems": 0}, {"minItems": 2, "maxItems": 3}, {"minItems": 0, "maxItems": 0}])
    return st.builds(lambda items, size: {"type": "array", "items": items, **size}, inner, sizes)


leaves = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("number", "boolean", "null")]),
    st.just({"enum": ["red", "зелёный", 3, None, [1, {"x": "}"}]]}),
    st.builds(lambda low: {"type": "integer", "minimum": low, "maximum": low + 1234}, st.integers(-2000, 2000)),
    st.builds(lambda low: {"type": "string", "minLength": low, "maxLength": low + 4}, st.integers(0, 3)),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(objects(inner), arrays(inner), st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)),
    max_leaves=6,
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60)
@given(schemas, st.integers(0, 2**32))
def test_what_is_written_satisfies_the_schema(name, schema, seed):
    text = written(made(name)[1].json_schema(schema), name, seed).decode("utf-8")
    assert satisfies(json.loads(text), schema), text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_object_of_any_kind(name):
    for seed in range(15):
        text = written(made(name)[1].json_object(), name, seed)
        assert text.startswith(b"{") and isinstance(json.loads(text.decode("utf-8")), dict)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_that_the_tokenizer_wrote_is_accepted(name):
    tokenizer, grammars = made(name)
    for value in ({"a": ["é\U0001f600", -1.5e3, {}, []], "b": None}, {"t": '\x00\\"\n'}, {}):
        for layout in ({}, {"separators": (",", ":")}):
            constraint = grammars.json_object()
            for token in tokenizer.encode(json.dumps(value, ensure_ascii=False, **layout)):
                assert not constraint.ended and constraint.mask()[token]
                constraint.accept(token)
            assert constraint.ended and constraint.complete and allowed(constraint) == [tokenizer.eod]


def test_the_end_may_come_where_more_may_follow():
    tokenizer, grammars = made("bytes")
    number = grammars.json_schema({"type": "integer"})
    assert not number.complete and not number.mask()[tokenizer.eod]
    for token in tokenizer.encode("12"):
        number.accept(token)
        assert number.complete and not number.ended and number.mask()[tokenizer.eod]
    number.accept(tokenizer.eod)
    assert number.ended
    with pytest.raises(ValueError, match="cannot be followed past"):
        number.accept(tokenizer.encode("3")[0])


def test_white_space_is_bounded():
    _, grammars = made("bytes")
    constraint = grammars.json_object()
    constraint.accept(ord("{") + 1)
    assert {b + 1 for b in b" \n\t\r"} & set(allowed(constraint)) == {ord(" ") + 1}
    constraint.accept(ord(" ") + 1)
    assert not {b + 1 for b in b" \n\t\r"} & set(allowed(constraint))
    assert allowed(grammars.json_object()) == [ord("{") + 1]


def test_copies_are_independent():
    tokenizer, grammars = made("world")
    first = grammars.json_schema({"enum": ["abc", "abd", 7]})
    first.accept(tokenizer.encode('"')[0])
    second, third = first.copy(), first.copy()
    for constraint, rest in ((first, 'abc"'), (second, 'abd"')):
        for token in tokenizer.encode(rest):
            constraint.accept(token)
        assert constraint.ended
    assert not third.ended and third.mask()[tokenizer.encode("ab")[0]]


class Odd(Tokenizer):
    """Ids of the same bytes, pieces of a character, ids without bytes, an end that has some."""

    name, vocab_size, eod = "odd", 9, 4
    table = (b'"', b'"', b"\xc3", b"\xa9", b'"', b"", b"\xff[0]", b"\xff", b'\xa9"')


def test_odd_vocabularies():
    constraint = Grammars(Odd(), 11).json_schema({"const": "éé"})
    for token, before in ((1, [0, 1]), (2, [2]), (3, [3]), (2, [2]), (8, [3, 8])):
        assert allowed(constraint) == before
        constraint.accept(token)
    assert allowed(constraint) == [4] and constraint.ended
    for token in (5, 6, 7, 9, 10, 999, 2):
        constraint = Grammars(Odd(), 11).json_schema({"const": "éé"})
        with pytest.raises(ValueError, match="cannot be followed past"):
            constraint.accept(token)


REFUSED = {
    "not/1": ({"properties": {"a/b": {"items": {"not": {}}}}}, "#/properties/a~1b/items.*not supported.*not"),
    "if": ({"$defs": {"x": {"if": {}, "then": {}}}, "$ref": "#/$defs/x"}, r"#/\$defs/x.*if"),
    "one of": ({"anyOf": [{"type": "null"}, {"oneOf": [{"minimum": 1}, {"maximum": 3}]}]}, "#/anyOf/1.*oneOf"),
    "look": ({"properties": {"p": {"type": "string", "pattern": "(?=a)b"}}}, "#/properties/p: pattern: look-around"),
    "format": ({"type": "string", "format": "foo"}, "#: Unknown format: foo"),
    "remote": ({"$ref": "http://example.com/x.json"}, "does not fetch"),
    "file": ({"$ref": "file:///etc/passwd"}, "does not fetch"),
    "never": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required property 'a'"),
    "loop": ({"$ref": "#"}, "no token can begin"),
    "ours": ({"x-guidance": {"item_separator": ";"}}, "x-guidance"),
    "list": ([], "must be an object, not list"),
    "nan": ({"minimum": float("nan")}, "no JSON"),
    "half a pair": ({"const": "\ud800"}, "hex escape|surrogate"),
    "deep": (functools.reduce(lambda inner, _: {"items": inner}, range(200), {}), "recursion limit"),
    "deeper": (functools.reduce(lambda inner, _: {"items": inner}, range(100_000), {}), "no JSON"),
    "large": ({"const": "x" * MAX_SCHEMA}, "characters"),
    "chain": ({"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(900)}}, "references"),
    "division": ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf"),
    "divisions": ({"allOf": [{"multipleOf": 997}, {"multipleOf": 9.91}], "type": "integer"}, "multipleOf"),
    "counted": ({"minProperties": 1, "properties": {str(i): {} for i in range(500)}}, "minProperties"),
    "patterned": ({"patternProperties": {f"^{i}": {} for i in range(51)}}, "patternProperties"),
}


@pytest.mark.parametrize("schema, why", REFUSED.values(), ids=REFUSED)
def test_a_schema_is_refused_in_a_line(schema, why):
    with pytest.raises(ValueError, match=why) as refused:
        made("bytes")[1].json_schema(schema)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("pattern", ["^a{1000000000}$", "^(((((a{20}){20}){20}){20}){20})$", "^(a|b)*a(a|b){200}$"])
def test_a_hostile_pattern_hangs_nothing(pattern):
    tokenizer, grammars = made("bytes")
    constraint = grammars.json_schema({"type": "string", "pattern": pattern})
    for token in tokenizer.encode('"' + "a" * 500):
        assert constraint.mask()[token]
        constraint.accept(token)


def test_a_text_beyond_the_limits_is_told():
    tokenizer, grammars = made("world")
    constraint = grammars.json_schema({"type": "string", "minLength": 10**9})
    (quote,), (many,) = tokenizer.encode('"'), tokenizer.encode("-" * 64)
    constraint.accept(quote)
    with pytest.raises(ValueError, match=r"cannot be followed (from|past)"):
        for _ in range(1000):
            constraint.mask()
            constraint.accept(many)
    assert not constraint.ended and not constraint.complete


def test_a_brace_in_a_text_ends_no_schema():
    words = ['} // x /* \n%json {"', '# \\ " %llguidance {}\nstart: /a/', "}}"]
    schema = {"type": "object", "properties": {w: {"const": w} for w in words}, "required": words}
    text = written(made("bytes")[1].json_schema(schema), "bytes", 0)
    assert json.loads(text).items() >= {w: w for w in words}.items()
