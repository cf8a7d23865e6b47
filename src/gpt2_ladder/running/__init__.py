"""Carry a training from its first step to its last, record it, and resume it."""
