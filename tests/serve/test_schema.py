"""Requests of all kinds, out of the API's own description: no error of the server's."""

from contextlib import suppress

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_is_the_servers_mistake(server, mode):
    """Streams of events are left out: some have no end."""
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(path_regex="events$")
    count = 0
    for found in api.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(max_examples=15, suppress_health_check=list(hypothesis.HealthCheck), database=None)
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            if isinstance(case.body, dict):
                case.body.pop("stream", None)
            case.call_and_validate(checks=CHECKS)

        with suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong with a request that says nothing
            check()
        count += 1
    assert count >= 18


def test_every_route_is_described(server):
    with server.client() as client:
        found = client.get("/openapi.json").json()
    for path, methods in found["paths"].items():
        for method, route in methods.items():
            assert route["description"], f"{method} {path} says nothing"
            for parameter in route.get("parameters", ()):
                assert parameter.get("description"), f"{method} {path}: {parameter['name']}"
            answers = {status for status in route["responses"] if status.startswith("2")}
            assert answers and "400" in route["responses"]
