"""Texts that installed packages carry, and the facts that the starter model is trained on."""
