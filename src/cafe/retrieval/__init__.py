"""What a model does to a corpus: embed it, index it, search it, mine it."""
