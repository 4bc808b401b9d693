"""Tests of the compiler, folder by folder as in `lowering/`."""
