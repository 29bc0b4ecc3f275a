"""What results say: the environment they are of, tables, figures, and which kernels they belong to."""
