"""What several commands use: typed arguments, naming a checkpoint, and the agreement of the forms of SSD."""
