"""Use a network: verify it, sample from it, grade it on HellaSwag, share it."""
