"""What generated code runs on: tile operations, the cache of sources, the registered ops."""
