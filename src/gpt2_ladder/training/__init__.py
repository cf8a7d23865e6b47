"""What one training step computes: data, the loop, precision, devices and ranks."""
