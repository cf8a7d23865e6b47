"""Use a network: verify it."""
