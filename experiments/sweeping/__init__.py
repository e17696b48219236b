"""Running the jobs of a sweep. llm/sweeps reads the results from the sweep's folder."""
