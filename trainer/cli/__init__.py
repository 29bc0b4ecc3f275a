"""`rlhf-train`: the command line."""

from trainer.cli.program import main as main
