"""What is wrong with a request is told in OpenAI's shape, whatever it is."""

import json
import traceback

import pytest
from guarded_app import OWNER, TOKENS, bearer, client, small_app, told
from starlette.testclient import TestClient

from rwkv_train.serve.guard import (
    ERRORS,
    ApiError,
    Guard,
    Tokens,
    check_json,
)


@pytest.mark.parametrize(
    "body",
    [
        b'{"metadata": {"a": NaN}, "text": "a"}',
        b'{"text": "a", "temperature": -Infinity}',
        b'{"text": "a", "temperature": 1e999}',
        b'{"text": "\xff"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\\ud800"}',
        b'{"text": "a", "metadata": {"\\uDC00 \\ud83d": 1}}',
        b'{"text": "a", "metadata": {"n": ' + b"9" * 5000 + b"}}",
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"text": "a", "metadata": {"a": ' + b"[" * 70 + b"]" * 70 + b"}}",
        b'{"text": "a"',
        b"{'text': 1}",
        b'"' + b'\\"' * 400_000,
        b'{"text": "a"}'.decode().encode("utf-16"),
        b"\x00",
        b"null",
        b"[]",
        b'"text"',
    ],
)
def test_bodies_that_are_unsound(body):
    answer = client().post("/v1/ask", content=body, headers={"Content-Type": "application/json"})
    error = told(answer, 400)
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 200


@pytest.mark.parametrize(
    "value",
    [
        {"text": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "n": [1.5, -2e-30, None, True]},
        ["[[[" * 100, '"[', "\\", '\\"', "]]", {"\\ud800": "\\"}],
        json.loads("[" * 64 + "]" * 64),
        10**400,
        "",
    ],
)
def test_bodies_that_are_sound(value):
    for ascii_alone in (True, False):
        check_json(json.dumps(value, ensure_ascii=ascii_alone).encode())
    with pytest.raises(ApiError, match="64 deep"):
        check_json(json.dumps(json.loads("[" * 64 + json.dumps([value]) + "]" * 64)).encode())


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "text", '"text" is missing; give it'),
        (
            {"text": "a", "temperature": 5},
            "temperature",
            '"temperature": Input should be less than or equal to 2; found 5',
        ),
        ({"text": "a", "temprature": 1}, "temprature", '"temprature" is not known here; leave it out'),
        ({"text": [{"role": "user", "content": "a"}, {"role": "user"}]}, "text.1.content", "is missing"),
        ({"text": [{"role": 3, "content": "a"}]}, "text.0.role", "valid string; found 3"),
        ({"text": 1}, "text", "valid string; found 1"),
        ([1], None, "the request: "),
    ],
)
def test_a_wrong_field_is_named(body, param, said):
    error = told(client().post("/v1/ask", json=body), 400)
    assert error["param"] == param and said in error["message"]


def test_errors():
    ours = client()
    assert told(ours.post("/v1/ask"), 400)["message"] == "the body is missing; send JSON"
    assert told(ours.get("/v1/teach"), 400)["param"] == "profile"
    assert "/openapi.json" in told(ours.get("/v1/%22%0a%ff"), 404)["message"]
    answer = ours.patch("/v1/teach")
    assert told(answer, 405) and answer.headers["allow"] == "DELETE, GET"
    answer = ours.get("/fail/api")
    assert told(answer, 409) == {
        "message": "no \\ud800 now",
        "type": "invalid_request_error",
        "param": "model",
        "code": "busy",
    }
    assert answer.headers["x-why"] == "this"
    assert "queue" in told(ours.get("/fail/ours"), 400)["message"]
    assert told(ours.get("/fail/full"), 507)["code"] == "disk_full"
    for how in ("gone", "theirs", "bug", "unknown"):
        answer = ours.get(f"/fail/{how}", headers=bearer(OWNER))
        assert told(answer, 500)["code"] == "internal_error" and "somebody" not in answer.text


def test_mistakes_reach_the_server_and_tell_no_token():
    """uvicorn logs what comes out of the app, with its traceback."""
    app = TestClient(Guard(small_app(Tokens(TOKENS)), Tokens(TOKENS)), "http://localhost")
    with pytest.raises(KeyError) as mistake:
        app.get("/fail/bug", headers=bearer(OWNER))
    assert OWNER not in "".join(traceback.format_exception(mistake.value))


def test_errors_are_described():
    described = small_app(Tokens()).openapi()
    for path in described["paths"].values():
        for operation in path.values():
            assert set(operation["responses"]) == {"200", *map(str, ERRORS)}
    assert "HTTPValidationError" not in described["components"]["schemas"]
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert described["paths"]["/v1/ask"]["post"]["security"] == [{"token": []}]
