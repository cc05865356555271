"""Structured masked attention."""
