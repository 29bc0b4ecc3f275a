"""The run folder: whose it is, its lock, logs, checkpoints, fingerprint, and how a run is stopped."""
