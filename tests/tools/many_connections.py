"""Open connections to a server that do nothing, and see how it answers beside them.

    python tests/tools/many_connections.py [COUNT]

Half of them send the beginning of a request, and no more. All are of this machine; a process needs as many open files.
"""

import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from kill_server import running

REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def asked(address: tuple[str, int]) -> float:
    """Milliseconds of a request."""
    begun = time.perf_counter()
    with socket.create_connection(address, 30) as connection:
        connection.sendall(REQUEST)
        found = b""
        while piece := connection.recv(65536):
            found += piece
    assert b" 200 OK" in found, found
    return 1000 * (time.perf_counter() - begun)


def told(what: str, times: list[float], server: psutil.Process) -> None:
    size, files = server.memory_info().rss >> 20, server.num_fds()
    print(f"{what}: median {statistics.median(times):.1f} ms, worst {max(times):.1f} ms; {size} MB, {files} open files")


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as (child, url):
        server, parts = psutil.Process(child.pid), urlsplit(url)
        address = parts.hostname, parts.port
        told("alone", [asked(address) for _ in range(50)], server)
        idle, times, begun = [], [], time.perf_counter()
        for n in range(count):
            idle.append(socket.create_connection(address, 30))
            if n % 2:
                idle[-1].sendall(REQUEST[:7])
            if n % 200 == 199:
                times.append(asked(address))
        told(f"while {count:,} come, in {time.perf_counter() - begun:.1f} s", times, server)
        told("beside them", [asked(address) for _ in range(50)], server)
        for connection in idle:
            connection.settimeout(60)
        ended = sum(_is_closed(connection) for connection in idle)
        told(f"after {ended:,} of them were closed by the server", [asked(address) for _ in range(50)], server)


def _is_closed(connection: socket.socket) -> bool:
    """Whether the server ends a connection, sooner or later."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["10000"])[0]))
