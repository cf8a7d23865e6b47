"""Measure the levels: step times, gains, loss parity, FLOPs, memory and profiles."""
