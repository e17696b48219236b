"""Chapter 5, second half: from logits to tokens to texts, and metrics of these."""
