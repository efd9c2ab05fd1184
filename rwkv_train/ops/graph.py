"""A CUDA graph: what a call launches, recorded once and replayed as one launch."""

import functools
from collections.abc import Callable

import torch


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """Run a call twice, record a third run of it, and return what replays that.

    A replay reads and writes the addresses of the recorded run: the call must take its inputs from tensors that stay,
    and what it leaves behind in that run is what every replay fills again. It must not wait for the device.
    Raises what the call raises, or torch where something cannot be recorded; the current stream is then that of before.
    """
    before, stream, graph = torch.cuda.current_stream(), side_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):  # builds kernels, fills caches
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
    finally:
        torch.cuda.set_stream(before)  # torch leaves the recording's current where that fails
    before.wait_stream(stream)
    return graph.replay


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """The one stream of all recordings: a backward runs where its forward did, and must not reach outside its graph."""
    return torch.cuda.Stream()
