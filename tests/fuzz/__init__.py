"""Random calls of the front door: a right answer, or one error that names the argument.

    python -m tests.fuzz                  # many calls, see --help
    python -m tests.fuzz --seed 123       # one call again, shown in full

Everything about a call follows from its seed. ``heads``, ``losses`` and ``headless`` draw a valid one, ``bad`` breaks
it, ``judge`` says whether what came of it is right. The truth is ``rlhf_kernels.reference`` in float64.
"""
