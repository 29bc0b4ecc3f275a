"""The trainer: supervised fine-tuning, reward model, PPO, and a demo that shows all three on a laptop.

It uses `rlhf_kernels` through its front door only. Importing this package is cheap and leaves torch alone, so that the
command line can set its thread policy first.
"""
