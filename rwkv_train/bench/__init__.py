"""Benchmarks: how fast, in how much memory, beside peers and the machine's own limits, all in the same run."""
