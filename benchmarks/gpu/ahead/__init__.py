"""What is made before a run on a GPU, and how the run finds it."""
