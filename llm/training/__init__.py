"""Chapter 5, first half: the loop, and the life of a run around it."""
