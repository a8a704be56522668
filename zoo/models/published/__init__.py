"""Published models: what a family is, how its configs are read, and where its weights lie in checkpoints."""
