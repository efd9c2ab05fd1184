"""Thoughts and calls of functions by the API, where a model writes what it is told."""

import json

import openai
import pytest
import torch
from feedback_toys import BYTES
from helpers import assert_close_rel
from served import served, small_config

from rwkv_train.generate import prefill
from rwkv_train.serve.tokens import LOCAL

ASKED = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '```json\n{"name": "weather", "arguments": {"city": "Köln"}}\n```'


class Script:
    """Allows the next token of a text alone, and then the end of the document."""

    def __init__(self, text: str):
        self.left = [*BYTES.encode(text), BYTES.eod]

    def mask(self):
        return torch.arange(257) == self.left[0]

    def accept(self, token):
        assert token == self.left.pop(0)


@pytest.fixture(scope="module")
def server(careless, tmp_path_factory):
    with served(small_config(tmp_path_factory.mktemp("g1"), template="g1", reply_tokens=200)) as running:
        yield running


@pytest.fixture
def ask(server, monkeypatch):
    """ask(what the model writes, **request): the choice, which is the same streamed."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def asked(writes, messages=ASKED, **more):
        monkeypatch.setattr(server.service, "_constraint", lambda format: lambda: Script(writes))
        whole = client.chat.completions.create(model="small", messages=messages, **more)
        assert 0 <= whole.usage.prompt_tokens_details.cached_tokens <= whole.usage.prompt_tokens
        told = {"content": "", "reasoning_content": "", "tool_calls": []}
        for chunk in client.chat.completions.create(model="small", messages=messages, stream=True, **more):
            delta = chunk.choices[0].delta.model_dump()
            told = {name: told[name] + (delta.get(name) or type(told[name])()) for name in told}
        choice = whole.choices[0]
        message = choice.message.model_dump()
        assert told["content"] == (message["content"] or "")
        assert told["reasoning_content"] == (message.get("reasoning_content") or "")
        functions = [
            [call["function"] for call in calls or []] for calls in (told["tool_calls"], message["tool_calls"])
        ]
        assert functions[0] == functions[1] and chunk.choices[0].finish_reason == choice.finish_reason
        return whole.id, choice

    return asked


@pytest.mark.parametrize(("effort", "suffix"), [("low", " (think a bit)"), ("minimal", ""), ("none", ""), (None, "")])
def test_a_thought_is_told_apart_and_not_kept(ask, server, effort, suffix):
    writes = {"low": ">\nHm.\n\nSo.\n</think>\nHi.", "minimal": ">\nHi."}.get(effort, " Hi.") + "\n\nUser:"
    id, choice = ask(writes, **({"reasoning_effort": effort} if effort else {}))
    assert choice.message.content == "Hi." and choice.finish_reason == "stop"
    assert getattr(choice.message, "reasoning_content", None) == ("Hm.\n\nSo." if effort == "low" else None)
    turn = server.service.sessions.get(id, LOCAL.name)
    assert BYTES.decode(turn.read) == f"User: hello{suffix}\n\nAssistant: Hi.\n\n"


def test_the_next_turn_goes_on_without_the_thought(ask, server):
    ask(">\nHm.\n</think>\nHi.\n\nUser:", reasoning_effort="low")
    messages = [*ASKED, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "more"}]
    model, version = server.service.teaching.model("small")
    asked = server.service.conversations.whole(messages, server.service.who(LOCAL, "small"), version)
    assert asked.state is not None and BYTES.decode(asked.read) == "User: more\n\nAssistant:"
    expected = prefill(model, [0, *BYTES.encode("User: hello (think a bit)\n\nAssistant: Hi.\n\n")])[1]
    for ours, whole in zip(asked.state, expected, strict=True):
        assert_close_rel(ours, whole, 1e-4)


def test_a_model_without_thoughts_says_so(careless, tmp_path):
    with served(small_config(tmp_path)) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="not taught to think"):
            client.chat.completions.create(model="small", messages=ASKED, reasoning_effort="low")


def test_a_function_is_called(ask):
    _, choice = ask(f" {CALL}\n\nUser:", tools=TOOLS)
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Köln"}
    sent = [*ASKED, choice.message.model_dump(exclude_none=True, exclude={"refusal"})]
    sent += [{"role": "tool", "tool_call_id": call.id, "content": "20"}]
    assert ask(" 20 degrees.\n\nUser:", sent, tools=TOOLS)[1].message.content == "20 degrees."


@pytest.mark.parametrize(
    "writes", [" Hi.", " ```python\nprint()\n```", " ```jso", f" Look:\n{CALL}", " ```json\n{\n```"]
)
def test_other_replies_stay_text(ask, writes):
    _, choice = ask(writes + "\n\nUser:", tools=TOOLS)
    assert choice.message.content == writes.strip() and choice.finish_reason == "stop"


def test_without_functions_a_block_is_text(ask):
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        assert ask(f" {CALL}\n\nUser:", **more)[1].message.content == CALL


def test_what_follows_a_call_is_told(ask):
    _, choice = ask(f" {CALL}\nI have asked.\n\nUser:", tools=TOOLS)
    assert choice.message.content == "I have asked." and choice.message.tool_calls[0].function.name == "weather"


def test_a_thought_that_is_cut_off_is_told_whole(ask):
    for writes, most in ((">\nHm a<", 7), (">\nHm a\n\nUse", 11)):
        _, choice = ask(writes, reasoning_effort="low", max_tokens=most)
        assert choice.message.reasoning_content == writes.removeprefix(">\n") and not choice.message.content


def test_a_format_is_followed_without_a_thought(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked = {"model": "small", "messages": ASKED, "max_tokens": 60, "response_format": {"type": "json_object"}}
    for effort in ("low", "minimal"):
        with pytest.raises(openai.BadRequestError, match="a reply in a format has no thought"):
            client.chat.completions.create(**asked, reasoning_effort=effort)
    assert client.chat.completions.create(**asked).choices[0].message.content.lstrip().startswith("{")


def test_calls_that_are_no_json_are_refused(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="expected a function's name and arguments in JSON"):
        client.chat.completions.create(model="small", messages=messages)
