"""Chapter 5, first half: the loop, and the lifecycle of a run around it."""
