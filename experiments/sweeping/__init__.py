"""Running the jobs of a sweep. What a sweep's folder says afterwards: llm/sweeps."""
