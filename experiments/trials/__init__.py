"""Trials of what the layers can and cannot do, apart from training runs."""
