"""The networks, what a fresh one looks like, their state, their loss and their adapters.

Nothing here knows of files, texts or optimizers.
"""
