"""Use a network: verify it, grade it on HellaSwag."""
