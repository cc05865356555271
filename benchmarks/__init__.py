"""Benchmarks: one file per job, named shapes, rivals interleaved in the same process, results as JSON."""
