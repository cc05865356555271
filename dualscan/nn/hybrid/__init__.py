"""What hybrid models are made of besides mixers: experts, mixers side by side, blocks that share their weights."""
