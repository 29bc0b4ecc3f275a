"""`rlhf-train eval`: win rates, and what a policy lost by its training."""
