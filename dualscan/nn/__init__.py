"""Modules with parameters. Every mixer is `forward(u, state=None, cu_seqlens=None) -> (y, state)`; the state is a
value."""
