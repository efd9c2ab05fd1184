"""Open files, of which a connection takes one."""

import resource
import subprocess
import sys

import pytest

from rwkv_train.serve.connections import raise_open_files, share_files


@pytest.mark.parametrize("files", [8, 64, 256, 1024, 4096, 20_000, 1 << 16])
def test_open_files_are_shared_out(files):
    most, backlog = share_files(files)
    assert min(most, backlog) >= 1
    if files >= 64:
        assert 3 * backlog <= most <= files - 3 * backlog - min(256, files // 4)


def test_the_limit_of_open_files_is_raised():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = "import resource as r; from rwkv_train.serve.connections import raise_open_files as f; "
    code += "r.setrlimit(r.RLIMIT_NOFILE, (100, 200)); print(f(), f(150), *r.getrlimit(r.RLIMIT_NOFILE))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["200", "150", "200", "200"]
    try:
        assert raise_open_files() == raise_open_files() <= before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
