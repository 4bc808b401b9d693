"""Tests of the language, file by file as in `nestloop/lang/`."""
