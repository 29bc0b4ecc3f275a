"""FOLDER STAGE [STAGE ...]: short runs, one after the other, in each of the processes that torchrun starts."""

import sys
from pathlib import Path

from tests.trainer_commands import command
from trainer.cli import main

if __name__ == "__main__":
    path = Path(sys.argv[1])
    for stage in sys.argv[2:]:
        if main(command(stage, path, path / f"spread-{stage}")):
            sys.exit(1)
