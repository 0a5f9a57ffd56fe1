"""What the experiments share: command line, data, optimisers, loop, checkpoints, metrics, plots."""
