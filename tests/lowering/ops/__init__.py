"""Tests of the op rows and the decompositions."""
