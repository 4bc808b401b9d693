"""Side-by-side measurements: peers interleaved in one process, ratios beside milliseconds."""
