"""Pallas's interpreter for GPU kernels, and what the kernels compute with under it.

Imported only where kernels are interpreted.
"""
