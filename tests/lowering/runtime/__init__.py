"""Tests of the generated ops as PyTorch sees them."""
