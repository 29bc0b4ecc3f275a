"""One measurement each; every module here is a verb of ``python -m benchmarks``."""
