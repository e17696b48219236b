"""Chapters 3 and 4: the GPT and the loss that trains it."""
