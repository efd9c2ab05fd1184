"""What a test calls in a process of its own."""


def hold(megabytes: int) -> int:
    return len(b"\1" * (megabytes * 10**6))
