"""Trials: models trained on synthetic tasks, several seeds at once, and read at many lengths."""
