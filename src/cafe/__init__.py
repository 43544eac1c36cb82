"""One vision-language model that retrieves, reranks and answers."""
