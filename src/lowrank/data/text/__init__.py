"""Text: sources, tokenizers, token files, and batches of them."""
