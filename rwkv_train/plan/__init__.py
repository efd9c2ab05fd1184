"""What a run would take, worked out before it begins: memory, operations, exchange, time."""
