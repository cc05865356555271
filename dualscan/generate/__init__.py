"""Generation: sampling rules and the engine that carries the recurrent state from token to token."""
