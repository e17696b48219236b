"""Sweeps of runs, read from their folders alone."""
