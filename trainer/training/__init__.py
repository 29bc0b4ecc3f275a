"""What every stage trains with: options, optimizer, schedule, seeds, precision, a run's session and state."""
