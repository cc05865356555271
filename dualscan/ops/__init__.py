"""Operators: tensors in, tensors out; no parameters, no configuration objects. One folder per operation."""
