"""Functions named, called and answered as text, and read back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_train.data.functions import as_texts, calls
from rwkv_train.data.known_templates import NAMED
from rwkv_train.data.render import Columns, render

WEATHER = {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "20"},
    {"role": "tool", "tool_call_id": "1", "content": "21"},
    {"role": "assistant", "content": "20 or 21."},
]
DEEP = {"function": {"name": "f", "arguments": "[" * 100_000}}
BLOCK = '```json\n{"name":"weather","arguments":{"city":"Köln"}}\n```'


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [WEATHER]])
def test_a_chat_with_functions(tools):
    found = render({"messages": CHAT, "tools": tools}, "auto", NAMED["g1"], Columns())
    listed = json.dumps([WEATHER], separators=(",", ":"))
    assert found.segments == [
        (
            f"System: Be brief.\nTools:\n{listed}\nReturn only a JSON function call.\n\nUser: Weather?\n\nAssistant:",
            False,
        ),
        (f" {BLOCK}\n{BLOCK}\n\n", True),
        ("User: Function output:\n20\nFunction output:\n21\n\nAssistant:", False),
        (" 20 or 21.\n\n", True),
    ]
    assert "tools" not in found.unused and "messages.tool_calls" not in found.unused


def test_functions_join_a_system_column_and_sharegpts_system_message():
    listed = f"Tools:\n{json.dumps([WEATHER], separators=(',', ':'))}\nReturn only a JSON function call."
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    sharegpt = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for record in ({"system": "Be kind.", "messages": asked}, {"conversations": sharegpt}):
        text, _ = render(record | {"tools": TOOLS}, "auto", NAMED["g1"], Columns()).segments[0]
        assert text == f"System: Be kind.\n{listed}\n\nUser: a\n\nAssistant:"


def test_functions_make_a_system_message():
    assert as_texts(CHAT[1:2], TOOLS)[0]["role"] == "system" and as_texts(CHAT[1:2]) == CHAT[1:2]


@pytest.mark.parametrize("tools", [["hammer"], [{}], "a saw", 7, {"a": 1}])
def test_a_column_of_something_else_is_not_used(tools):
    assert "tools" in render({"messages": CHAT, "tools": tools}, "auto", NAMED["g1"], Columns()).unused


@pytest.mark.parametrize(
    "call", ["x", {}, {"function": {"name": "f", "arguments": "{"}}, {"function": None}, {"name": None}, DEEP]
)
def test_what_is_no_call_is_refused(call):
    with pytest.raises(ValueError, match="message 1: expected a function's name"):
        as_texts([{"role": "assistant", "content": "", "tool_calls": [call]}])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


@given(st.lists(st.tuples(st.text(min_size=1), st.dictionaries(st.text(max_size=4), VALUES, max_size=3)), max_size=3))
def test_calls_are_read_as_they_are_written(asked):
    wanted = [{"name": name, "arguments": arguments} for name, arguments in asked]
    (message,) = as_texts([{"role": "assistant", "content": "", "tool_calls": wanted}])
    assert calls(message["content"]) == (wanted, "")
    assert calls(f"  {message['content']}\nand so on") == (wanted, "and so on")


@pytest.mark.parametrize(
    "reply", ["", "20 degrees.", "```json\n{\n```", "```json\n[1]\n```", 'Say ```json\n{"name":"f"}\n```']
)
def test_other_replies_call_nothing(reply):
    assert calls(reply) == ([], reply.lstrip())
