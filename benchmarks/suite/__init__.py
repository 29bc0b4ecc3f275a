"""What ``pytest benchmarks/ --benchmark-only`` collects."""
