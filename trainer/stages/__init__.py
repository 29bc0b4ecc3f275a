"""The subcommands that train, one module each, and `split`."""
