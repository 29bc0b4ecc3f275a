"""Side-by-side measurements: `python -m benchmarks.side_by_side` from a checkout."""
