"""The trainer: command line, step, optimizers, runs, checkpoints, metrics."""
