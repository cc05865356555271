"""Training: configuration, optimizer, schedule, checkpoints, metrics and the loop that joins them."""
