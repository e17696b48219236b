"""Chapter 5, second half: logits to tokens to texts, and what can be measured of them."""
