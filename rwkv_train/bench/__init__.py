"""Benchmarks: how fast, in how much memory, how good, beside peers and the machine's own limits, all in one run.

Nothing imports this room; a test asks whether something is right, and never how long it takes.
"""
