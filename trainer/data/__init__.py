"""From a data file to packed token sequences: reading, prompts, chat templates, encoding, packing."""
