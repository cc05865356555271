"""Language models: configuration, the model, published and small sizes, weights on disk, and its accounting."""
