"""What the server does, for Prometheus."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rwkv_train.serve.jobs import End

if TYPE_CHECKING:
    from rwkv_train.serve.service import Service

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, service: "Service"):
        self._registry = registry = CollectorRegistry()
        load, more = service.batcher.load, {"registry": registry}

        def gauge(name: str, phrase: str, value) -> None:
            Gauge(f"rwkv_{name}", phrase, **more).set_function(value)

        gauge("lanes", "replies being written", lambda: load.lanes)
        gauge("waiting", "replies that wait for a lane", lambda: load.waiting)
        gauge("written_tokens_total", "tokens written", lambda: load.written)
        gauge("read_tokens_total", "tokens of prompts read", lambda: load.read)
        gauge("turns", "turns of conversations that are kept", lambda: service.sessions.sizes[0])
        gauge("state_memory_bytes", "states in memory", lambda: service.sessions.sizes[1])
        gauge("state_disk_bytes", "states on the disk", lambda: service.sessions.sizes[2])
        gauge("corrections_waiting", "corrections not tried yet", lambda: sum(map(_waiting(service), service.learners)))
        self._replies = Counter("rwkv_replies", "replies that ended, by why", ["reason"], **more)
        self._corrections = Counter("rwkv_corrections", "corrections, by what became of them", ["status"], **more)
        step = Histogram("rwkv_step_seconds", "a token of all lanes, with a piece of a prompt", buckets=SECONDS, **more)
        load.observers.append(step.observe)

    def ended(self, end: End) -> None:
        self._replies.labels(end.reason).inc()

    def learnt(self, feedback: dict) -> None:
        self._corrections.labels(feedback["status"]).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


def _waiting(service: "Service"):
    return lambda name: service.teaching.waiting(name)
