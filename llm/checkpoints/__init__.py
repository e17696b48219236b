"""Weights in and out: our checkpoints, Hugging Face's layout and hub, the book's files."""
