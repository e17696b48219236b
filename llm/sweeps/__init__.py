"""Sweeps of runs, read only from their folders."""
