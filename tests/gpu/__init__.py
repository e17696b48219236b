"""Tests that need a GPU: `pytest -m gpu`. They run nowhere else; see docs/gpus.md."""
