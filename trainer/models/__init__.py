"""Causal language models as a backbone and a head, and the same backbone with a scalar head."""
