"""Trials: models trained on synthetic tasks, several seeds at once, and models with weights set by
hand."""
