"""The API as OpenAI's own client uses it."""

import json

import openai
import pytest
from feedback_toys import BYTES
from served import TOKENS, served, small_config

from rwkv_train.generate import Sampling, generate_text

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
    "additionalProperties": False,
}
BAD = {"name": "a", "schema": {"type": "thing"}}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client):
    names = [m.id for m in client.models.list()]
    assert names == ["small", "base"] and client.models.retrieve("small").owned_by == "rwkv_train"


def test_a_reply_is_the_same_whole_and_in_pieces(client):
    asked = {"model": "small", "messages": HELLO, "seed": 3, "max_tokens": 20, "temperature": 1.0, "top_p": 1.0}
    whole = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == again.choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens == 20
    assert usage.total_tokens == usage.prompt_tokens + 20 and usage.prompt_tokens_details.cached_tokens == 0


def test_choices_have_seeds_of_their_own_and_scores_of_the_model(client):
    asked = {"model": "small", "messages": HELLO, "temperature": 2.0, "max_tokens": 6}
    several = client.chat.completions.create(**asked, seed=5, n=3, logprobs=True, top_logprobs=4)
    alone = [client.chat.completions.create(**asked, seed=5 + n, logprobs=True).choices[0] for n in range(3)]
    assert [c.message.content for c in several.choices] == [c.message.content for c in alone]
    assert several.usage.completion_tokens == 18
    for choice, other in zip(several.choices, alone, strict=True):
        for token, same in zip(choice.logprobs.content, other.logprobs.content, strict=True):
            assert token.logprob == pytest.approx(same.logprob, abs=1e-5) and token.bytes == same.bytes
            assert len(token.top_logprobs) == 4 and token.top_logprobs[0].logprob >= token.logprob
    streamed = client.chat.completions.create(**asked, seed=5, n=3, logprobs=True, top_logprobs=4, stream=True)
    scores = [
        t.bytes
        for c in streamed
        if c.choices[0].index == 1 and c.choices[0].logprobs
        for t in c.choices[0].logprobs.content
    ]
    assert scores == [t.bytes for t in several.choices[1].logprobs.content]


def test_stops(client):
    asked = {"model": "small", "messages": HELLO, "seed": 3, "max_tokens": 20, "temperature": 1.0, "top_p": 1.0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[7:9]
    cut = client.chat.completions.create(**asked, stop=[stop, "never so long a text"])
    assert (
        cut.choices[0].finish_reason == "stop" and cut.choices[0].message.content == whole[: whole.index(stop)].rstrip()
    )


def test_presets_and_what_a_request_gives_beside_them(client, tmp_path):
    def text(client, **asked):
        body = {"seed": 3} | asked
        return client.responses.create(model="small", input="hello", max_output_tokens=20, extra_body=body).output_text

    greedy, wild = text(client, temperature=0), text(client, temperature=2, top_p=1)
    assert text(client, preset="greedy") == text(client, temperature=2, top_p=1, min_p=1) == greedy != wild
    assert text(client, preset="greedy", temperature=2, top_p=1) == wild
    penalties = {"presence_penalty": 1, "frequency_penalty": 0.1, "penalty_decay": 0.988}
    thinking = text(client, preset="thinking")
    assert thinking == text(client, temperature=0.96, top_p=0.76, top_k=32, **penalties)
    config = small_config(tmp_path, preset="thinking", stop=[thinking[8]])
    with served(config) as other, openai.OpenAI(base_url=f"{other.url}/v1", api_key="none", max_retries=0) as theirs:
        assert text(theirs) == thinking[: thinking.index(thinking[8])].rstrip()
        assert text(theirs, stop=[]) == thinking and text(theirs, stop=[], preset="greedy") == greedy


def test_json(client):
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="small",
            messages=HELLO,
            max_tokens=400,
            seed=1,
            stream=stream,
            response_format={"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}},
        )
        text = (
            "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        )
        found = json.loads(text)
        assert found.keys() == {"city", "sunny"} and isinstance(found["sunny"], bool) and len(found["city"]) <= 4
    text = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA}}
    response = client.responses.create(model="small", input="hello", text=text, max_output_tokens=400)
    assert json.loads(response.output_text).keys() == {"city", "sunny"}


def test_completions_are_what_the_library_writes(client, server):
    asked = {"model": "small", "temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "seed": 4}
    expected = [
        "".join(generate_text(server.service.opened.model, BYTES, prompt, Sampling(), 8, seed))
        for prompt, seed in (("one", 4), ("three", 5))
    ]
    found = client.completions.create(prompt=["one", "three"], **asked)
    assert [c.text for c in found.choices] == expected
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(prompt=["one", "three"], stream=True, echo=True, **asked):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert streamed == {0: f"one{expected[0]}", 1: f"three{expected[1]}"}
    scored = client.completions.create(prompt="one", logprobs=2, echo=True, **asked).choices[0]
    assert scored.text == f"one{expected[0]}" and len(scored.logprobs.tokens) == 8
    assert scored.logprobs.text_offset[0] == 3 and all(len(top) == 2 for top in scored.logprobs.top_logprobs)


def test_a_conversation_goes_on_from_any_of_its_replies(client):
    first = client.responses.create(model="small", input="hello", instructions="Be brief.", metadata={"a": "b"})
    second = client.responses.create(model="small", input="and now?", previous_response_id=first.id)
    assert first.metadata == {"a": "b"} and second.previous_response_id == first.id
    cached = second.usage.input_tokens_details.cached_tokens
    assert first.usage.input_tokens < cached < second.usage.input_tokens
    items = client.responses.input_items.list(second.id).data
    said = [(i.role, i.content[0].text) for i in items]
    assert said == [
        ("system", "Be brief."), ("user", "hello"), ("assistant", first.output_text), ("user", "and now?"),
    ]  # fmt: skip
    kept = client.responses.retrieve(second.id)
    assert kept.output_text == second.output_text and kept.status == second.status
    other = client.responses.create(model="small", input="or this?", previous_response_id=first.id)
    assert other.usage.input_tokens_details.cached_tokens == cached
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="no response of yours"):
        client.responses.retrieve(first.id)
    third = client.responses.create(model="small", input="still?", previous_response_id=second.id)
    assert third.usage.input_tokens_details.cached_tokens > 0  # its own state is there


def test_a_conversation_that_is_sent_whole_is_read_once(client):
    one = client.chat.completions.create(model="small", messages=HELLO, seed=1)
    more = [
        *HELLO,
        {"role": "assistant", "content": one.choices[0].message.content},
        {"role": "user", "content": "go on"},
    ]
    two = client.chat.completions.create(model="small", messages=more, seed=1)
    read = two.usage.prompt_tokens_details.cached_tokens
    assert read > one.usage.prompt_tokens and two.usage.prompt_tokens > read
    response = client.responses.create(model="small", input=more)
    assert response.usage.input_tokens_details.cached_tokens == read
    edited = [*more[:-1], {"role": "user", "content": "another question"}]
    three = client.chat.completions.create(model="small", messages=edited)
    assert three.usage.prompt_tokens_details.cached_tokens == read


def test_a_response_is_streamed(client):
    asked = {"model": "small", "input": "hello", "temperature": 0, "max_output_tokens": 3}
    events = list(client.responses.create(**asked, stream=True))
    kinds, final = [event.type for event in events], events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == final.output_text
    assert kinds[:2] == ["response.created", "response.in_progress"] and "response.output_text.delta" in kinds
    assert kinds[-1] == "response.incomplete" and final.incomplete_details.reason == "max_output_tokens"
    assert client.responses.retrieve(final.id).output_text == final.output_text


def refused(client, status, match, **asked):
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**{"model": "small", "messages": HELLO} | asked)
    assert error.value.status_code == status and match in error.value.body["message"]
    return error.value.body


@pytest.mark.parametrize(
    ("status", "match", "param", "asked"),
    [
        (404, "there are: small, base", "model", {"model": "other"}),
        (400, "not known here", "parallel_tool_calls", {"parallel_tool_calls": True}),
        (400, "at most 4,096", None, {"max_tokens": 5000}),
        (400, "is empty", None, {"messages": [{"role": "user", "content": " "}]}),
        (400, "role", "messages.0.role", {"messages": [{"role": "robot", "content": "x"}]}),
        (400, "needs logprobs", "top_logprobs", {"top_logprobs": 3}),
        (400, "less than or equal to 100", "temperature", {"temperature": 101}),
        (400, "'thinking'", "preset", {"extra_body": {"preset": "wild"}}),
        (400, "thing", "response_format", {"response_format": {"type": "json_schema", "json_schema": BAD}}),
        (400, "32,768", None, {"messages": [{"role": "user", "content": "x" * 40_000}]}),
    ],
)  # fmt: skip
def test_errors_are_openais(client, status, match, param, asked):
    body = refused(client, status, match, **asked)
    assert body.keys() == {"message", "type", "param", "code"} and body["param"] == param
    assert body["type"] == "invalid_request_error"


def test_a_token_is_asked_for(guarded):
    with pytest.raises(openai.AuthenticationError, match="not known here"):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong-token-0123456789", max_retries=0).models.list()
    found = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=TOKENS["viewer"]).models.list()
    assert [(m.id, m.talk, m.teach) for m in found] == [("small", True, False), ("base", True, False)]
