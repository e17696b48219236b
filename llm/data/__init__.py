"""Chapter 2: text to tokens to windows to batches."""
