"""The base model, its tokenizer, where it runs, and what of it is trainable."""
