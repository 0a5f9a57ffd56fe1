"""Pallas kernels for Hopper and datacenter Blackwell GPUs: the E88 recurrence and its surroundings.

`recurrence`, `qkv_activation` and `decode` are the ops. This file imports nothing, so that `limits`
and `target` can be imported without JAX.
"""
