"""What every room stands on: configs as files, the console, ranks, statistics, permission to run code."""
