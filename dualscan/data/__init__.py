"""Text to training batches: `sources`, `tokenizer`, `packing` and `shards` (streams of tokens), `loader`.

`corpus.prepare` does it all: from a path, or the embedded text, to tokens to train on and tokens held out.
"""
