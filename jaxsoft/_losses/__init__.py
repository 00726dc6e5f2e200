"""The losses of given logits, and what all losses do with one number per row."""
