"""Data parallelism: one reduction per step, ZeRO, compressed sums, and batches of processes."""
