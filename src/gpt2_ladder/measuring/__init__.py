"""Measure the levels: steps in turn, gains, loss parity, cost, memory and profiles."""
