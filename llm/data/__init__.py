"""Chapter 2: from text to tokens to windows to batches."""
