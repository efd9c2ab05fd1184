"""What a run would take, worked out before it begins: memory, operations, exchange, time.

Nothing here trains anything.
"""
