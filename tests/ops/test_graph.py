"""Recording a CUDA graph, without a GPU: which stream is current afterwards, and what is called."""

from contextlib import contextmanager

import pytest
import torch

from rwkv_train.ops import graph


class Streams:
    """torch.cuda's part in a recording; as there, a recording that fails does not put the stream back."""

    def __init__(self, monkeypatch):
        self.current, self.recording = self, False
        for name in ("current_stream", "set_stream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(graph, "side_stream", lambda: self.Side())

    class Side:
        def wait_stream(self, other):
            pass

    def wait_stream(self, other):
        pass

    def replay(self):
        return "replayed"

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, _, stream):
        before, self.current, self.recording = self.current, stream, True
        yield
        self.current, self.recording = before, False


def test_a_call_runs_twice_before_it_is_recorded(monkeypatch):
    streams, seen = Streams(monkeypatch), []
    replay = graph.capture(lambda: seen.append(streams.recording))
    assert seen == [False, False, True] and replay() == "replayed" and streams.current is streams


def test_a_failed_recording_leaves_the_stream_of_before(monkeypatch):
    streams = Streams(monkeypatch)

    def call():
        if streams.recording:
            raise RuntimeError("not allowed while recording")

    with pytest.raises(RuntimeError, match="not allowed"):
        graph.capture(call)
    assert streams.current is streams
