"""`rlhf-train demo`: the whole recipe from scratch on a laptop."""
