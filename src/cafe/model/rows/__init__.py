"""What enters the model: prompts, sequences, rows, images.

A conversation (`inputs`) becomes text (`render`, `prompts`) and tokens with images (`images`); the
tokens of several sequences become rows (`trie`, `rows`). `collate` does all of it: begin there.
"""
