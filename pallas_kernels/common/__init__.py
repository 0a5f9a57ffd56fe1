"""Parts that kernels of several ops share: batching and sharding, launch, bulk copies, lane ops."""
