"""SSD on a CPU as compiled kernels: the chunked form of `chunked.py`, one head's chunk at a time in the caches."""
