"""What is computed, and what is right: batches, losses, float64 truth and its judge, an update of the trainer."""
