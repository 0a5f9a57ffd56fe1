"""Parts that kernels of several ops share: batching and sharding, launch, copies, lane ops."""
