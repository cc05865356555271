"""Whole models: prefill, training step, decoding."""
