"""The work of each script. This package may import all others."""
