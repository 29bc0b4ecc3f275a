"""Where rewards come from, and what becomes of a score before the policy gets it."""
