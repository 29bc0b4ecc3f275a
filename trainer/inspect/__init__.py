"""`rlhf-train inspect`: what decides the worth of preference data, before training."""
