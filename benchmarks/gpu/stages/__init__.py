"""The stages of a run on a GPU, and what they share."""
