"""What a token does not allow, on every route that there is."""

import pytest
from served import TOKENS

TALK = {("post", "/v1/chat/completions"), ("post", "/v1/completions"), ("post", "/v1/responses")}
OWN = {
    ("get", "/v1/responses/{id}"),
    ("delete", "/v1/responses/{id}"),
    ("get", "/v1/responses/{id}/input_items"),
}
OPEN = {("get", "/health")}
SEEN = {("get", "/v1/models"), ("get", "/v1/models/{id}")}
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/feedback": {"kind": "answer", "question": "a?", "answer": "b"},
    "/v1/feedback/settings": {"steps": 3},
}


def routes(client):
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method in methods:
            yield method, path


def asked(client, method, path, id="1"):
    body = BODIES.get(path) if method in ("post", "patch") else None
    return client.request(method, path.replace("{id}", id), json=body)


@pytest.fixture(scope="module")
def kept(guarded):
    """What the owner has: a response, and a correction."""
    with guarded.client("owner") as client:
        response = client.post("/v1/responses", json={"input": "hello"}).json()
        correction = client.post("/v1/feedback", json={"kind": "answer", "question": "a?", "answer": "b"}).json()
        with client.stream("GET", f"/v1/feedback/{correction['id']}/events") as events:
            assert "done" in events.read().decode()
    return response["id"], correction["id"]


def test_without_a_token_there_is_nothing(guarded):
    with guarded.client("owner") as owner, guarded.client() as nobody:
        found = list(routes(owner))
        assert len(found) >= 18
        for method, path in found:
            if (method, path) not in OPEN:
                answer = asked(nobody, method, path)
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_viewer_touches_no_weight_no_setting_and_no_session_of_another(guarded, kept):
    response, correction = kept
    service = guarded.service
    learner = service.learners["small"]
    before = learner.weights, list(learner.journal.records), service.sessions.get(response, "owner")
    with guarded.client("owner") as owner:
        every = list(routes(owner))
    with guarded.client("viewer") as viewer:
        for method, path in every:
            id = response if path.startswith("/v1/responses") else "small" if "models" in path else str(correction)
            answer = asked(viewer, method, path, id)
            if (method, path) in TALK | OPEN | SEEN:
                assert answer.status_code == 200, (method, path)
            elif (method, path) in OWN:
                assert answer.status_code == 404, (method, path)
            else:
                assert answer.status_code == 403, (method, path)
        other = viewer.post("/v1/responses", json={"input": "so?", "previous_response_id": response})
        assert other.status_code == 404
    assert (learner.weights, list(learner.journal.records), service.sessions.get(response, "owner")) == before


def test_who_may_teach_another_profile_may_not_teach_this_one(guarded, kept):
    learner = guarded.service.learners["small"]
    before = learner.weights, list(learner.journal.records)
    with guarded.client("stranger") as stranger:
        for method, path in routes(stranger):
            if path.startswith("/v1/feedback"):
                assert asked(stranger, method, path, str(kept[1])).status_code == 403, (method, path)
        assert stranger.post("/v1/responses", json={"input": "hi"}).status_code == 200
        assert stranger.get("/metrics").status_code == 403
    assert (learner.weights, list(learner.journal.records)) == before


@pytest.mark.parametrize(
    "path", ["/page/../command.py", "/page/%2e%2e/command.py", "/page/..%2fcommand.py", "//etc/passwd"]
)
def test_no_path_leaves_the_page(guarded, path):
    with guarded.client("owner") as client:
        answer = client.get(path)
        assert answer.status_code in (400, 404) and "import" not in answer.text


def test_no_answer_holds_a_token(guarded):
    with guarded.client("owner") as client:
        texts = [client.get(path).text for path in ("/openapi.json", "/metrics", "/v1/models", "/")]
        texts.append(client.post("/v1/responses", json={"input": TOKENS["owner"][:3], "model": "none"}).text)
    assert not any(token in text for token in TOKENS.values() for text in texts)
