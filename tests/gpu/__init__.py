"""Tests on a GPU: python -m pytest tests/gpu."""
