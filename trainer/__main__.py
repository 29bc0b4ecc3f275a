"""`python -m trainer` is `rlhf-train`."""

import sys

try:
    from trainer.cli.program import main
except KeyboardInterrupt:  # Whoever stops a program that has hardly begun wants no traceback of imports either.
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
