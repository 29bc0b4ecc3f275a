"""What this library costs, and how right it is: ``python -m benchmarks --help`` lists the measurements."""
