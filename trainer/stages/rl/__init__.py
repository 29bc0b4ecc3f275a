"""Learning from sampled responses: PPO, GRPO and its relatives."""
