"""Edit the graph of a model: trace it with masks, double its batch, write the training forwards."""
