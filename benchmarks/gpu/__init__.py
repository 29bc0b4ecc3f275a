"""Everything there is to run on a GPU, in one command: ``python -m benchmarks.gpu --help``."""

# A stage is the module of this name. Its share of the time, and of that of a dry run; in the order of their value.
STAGES = {
    "ceilings": (5, 3),
    "correctness": (60, 60),
    "head": (80, 50),
    "peers": (90, 40),
    "gae": (35, 20),
    "update": (50, 40),
    "sanitize": (100, 20),
    "pytests": (130, 20),
}
PARTS = ("wheels", "ext", "triton")  # ``prepare`` makes these folders, and ``--carried`` uses them.
