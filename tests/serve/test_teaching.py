"""Corrections through the API: kept, learnt while replies go on, told, and taken back."""

import json

import pytest
from served import events, served, small_config


def said(client, text, **more):
    asked = {"input": text, "temperature": 0} | more
    return client.post("/v1/responses", json=asked).json()


def text_of(response):
    return response["output"][0]["content"][0]["text"]


def taught(client, **asked):
    """A correction, when it is learnt."""
    answer = client.post("/v1/feedback", json=asked)
    assert answer.status_code == 202, answer.text
    return watched(client, answer.json()["id"])[-1][1]


def watched(client, number):
    with client.stream("GET", f"/v1/feedback/{number}/events") as response:
        return list(events(response))


@pytest.fixture
def client(server):
    with server.client() as found:
        yield found


def test_a_reply_is_corrected_in_its_dialogue(server, client):
    learner = server.service.learners["small"]
    before = learner.weights
    first = said(client, "hello")
    second = said(client, "sun?", previous_response_id=first["id"])
    answer = client.post("/v1/feedback", json={"kind": "answer", "response_id": second["id"], "answer": "hot"}).json()
    assert answer["question"] == "sun?" and answer["rejected"] == (text_of(second) or None)
    assert answer["response_id"] == second["id"] and answer["status"] in ("waiting", "learning", "learnt")
    seen = watched(client, answer["id"])
    assert [name for name, _ in seen if name != "watch"] == ["received", "step", "step", "gate", "done"]
    done = seen[-1][1]
    assert done["status"] == "learnt" and done["outcome"]["accepted"] and done["outcome"]["steps"] == 2
    assert done["outcome"]["paraphrases"] == ["one more?"] and done["outcome"]["contrasts"] == ["near?", "nearer?"]
    assert watched(client, answer["id"]) == seen  # the same for whoever comes late
    record = learner.journal.records[answer["id"] - 1]
    context = server.service.conversations.context(server.service.sessions.get(second["id"], "local"))
    assert list(record["context"]) == context and len(context) > 10
    assert learner.weights != before
    third = said(client, "and?", previous_response_id=second["id"])
    assert third["version"] == client.get("/v1/models").json()["data"][0]["version"] != second["version"]
    assert third["usage"]["input_tokens_details"]["cached_tokens"] == 0  # read again, by the weights of now
    undone = client.delete(f"/v1/feedback/{answer['id']}").json()
    assert undone["undone"] == [answer["id"]] and undone["version"] == second["version"]
    assert learner.weights == before
    assert client.get(f"/v1/feedback/{answer['id']}").json()["status"] == "undone"
    assert client.delete(f"/v1/feedback/{answer['id']}").status_code == 409


def test_every_kind(server, client):
    reply = said(client, "ice?")
    good = taught(client, kind="good", response_id=reply["id"]) if text_of(reply) else None
    bad = taught(client, kind="bad", response_id=reply["id"])
    teach = taught(client, kind="answer", question="sea?", answer="wet")
    also = taught(client, kind="also", question="the sea?")
    keep = taught(client, kind="keep", question="the lake?", of=teach["id"])
    assert bad["answer"] is None and bad["rejected"] == text_of(reply)
    assert (also["of"], also["answer"], also["kind"]) == (teach["id"], "wet", "also")
    assert (keep["of"], keep["kind"]) == (teach["id"], "keep")
    listed = client.get("/v1/feedback").json()["data"]
    known = {each["id"]: each for each in listed}
    for each in filter(None, (good, bad, teach, also, keep)):
        assert known[each["id"]]["kind"] == each["kind"] and known[each["id"]]["created_at"]
    exported = [json.loads(line) for line in client.get("/v1/feedback/export").text.splitlines()]
    assert {"role": "assistant", "content": "wet"} in [chat["messages"][-1] for chat in exported]
    assert client.delete(f"/v1/feedback/{teach['id']}").json()["undone"][:2] == [teach["id"], also["id"]]


@pytest.mark.parametrize(
    ("status", "match", "asked"),
    [
        (400, "needs answer", {"kind": "answer", "question": "x?"}),
        (400, "needs question", {"kind": "also"}),
        (400, "needs response_id", {"kind": "good"}),
        (400, "takes no answer", {"kind": "bad", "response_id": "resp_1", "answer": "x"}),
        (404, "no response of yours", {"kind": "answer", "response_id": "resp_1", "answer": "x"}),
        (400, "question is empty", {"kind": "answer", "question": " ", "answer": "x"}),
        (400, "no active correction", {"kind": "also", "question": "x?", "of": 10_000}),
        (404, "there are: small, base", {"kind": "answer", "question": "x?", "answer": "y", "model": "other"}),
        (400, "without corrections", {"kind": "answer", "question": "x?", "answer": "y", "model": "base"}),
    ],
)
def test_what_cannot_be_learnt_is_refused_and_not_kept(server, client, status, match, asked):
    count = len(server.service.learners["small"].journal.records)
    answer = client.post("/v1/feedback", json=asked)
    assert answer.status_code == status and match in answer.json()["error"]["message"]
    assert len(server.service.learners["small"].journal.records) == count


def test_settings_have_words(server, client):
    found = {each["name"]: each for each in client.get("/v1/feedback/settings").json()["data"]}
    assert found["steps"]["type"] == "integer" and "gradient steps" in found["steps"]["description"]
    changed = client.patch("/v1/feedback/settings", json={"steps": 7, "max_kl": 1}).json()["data"]
    assert {each["name"]: each["value"] for each in changed}["steps"] == 7
    assert server.service.learners["small"].config.steps == 7
    for bad in ({"steps": 1.5}, {"steps": -1}, {"nothing": 1}, {"trainable": "all"}):
        assert client.patch("/v1/feedback/settings", json=bad).status_code == 400
    client.patch("/v1/feedback/settings", json={"steps": found["steps"]["value"], "max_kl": found["max_kl"]["value"]})


def test_what_waits_when_the_server_stops_is_learnt_after_the_next_start(careless, tmp_path):
    config = small_config(tmp_path)
    with served(config) as running, running.client() as client:
        ids = [
            client.post("/v1/feedback", json={"kind": "answer", "question": f"{n}?", "answer": str(n)}).json()["id"]
            for n in range(4)
        ]
        reply = said(client, "hello")
    with served(config) as running, running.client() as client:
        for number in ids:
            assert watched(client, number)[-1][1]["status"] == "learnt"
        assert client.get(f"/v1/responses/{reply['id']}").json()["output"] == reply["output"]
        assert said(client, "and?", previous_response_id=reply["id"])["previous_response_id"] == reply["id"]


def test_several_profiles_learn_apart(careless, tmp_path):
    with served(small_config(tmp_path, profiles=["one", "two"])) as running, running.client() as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["one", "two", "base"]
        answer = client.post("/v1/feedback?", json={"kind": "answer", "question": "a?", "answer": "b", "model": "two"})
        number = answer.json()["id"]
        with client.stream("GET", f"/v1/feedback/{number}/events?model=two") as response:
            assert list(events(response))[-1][1]["status"] == "learnt"
        versions = {each["id"]: each["version"] for each in client.get("/v1/models").json()["data"]}
        assert versions["one"] == versions["base"] != versions["two"]
        assert client.get("/v1/feedback").json()["data"] == []


def test_events_of_all_corrections(server, client):
    with server.client() as listener, listener.stream("GET", "/v1/feedback/events") as response:
        heard = events(response)
        lines = response.iter_lines()
        assert next(lines) == ": here"  # it listens
        done = taught(client, kind="answer", question="moon?", answer="grey")
        seen = []
        for line in lines:
            seen += [line[7:]] if line.startswith("event: ") else []
            if seen[-1:] == ["done"]:
                break
        assert [name for name in seen if name != "watch"] == ["received", "step", "step", "gate", "done"]
        heard.close()
    assert done["status"] == "learnt"


def test_sleep(server, client):
    for n in range(2):
        taught(client, kind="answer", question=f"sleep {n}?", answer=str(n))
    with server.client() as listener, listener.stream("GET", "/v1/feedback/events") as response:
        lines = response.iter_lines()
        assert next(lines) == ": here"
        assert client.post("/v1/feedback/sleep").status_code == 202
        line = next(line for line in lines if line.startswith("data: ") and '"accepted"' in line)
        assert {"accepted", "why"} <= json.loads(line[6:]).keys()
    metrics = client.get("/metrics").text
    assert 'rwkv_corrections_total{status="learnt"}' in metrics and "rwkv_step_seconds_bucket" in metrics
