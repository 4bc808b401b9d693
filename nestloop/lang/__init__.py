"""The language: what may be declared, and what it is checked for. Knows nothing of how a loop is run."""
