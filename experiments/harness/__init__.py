"""The trainer: command line, step, optimisers, runs, checkpoints, metrics."""
