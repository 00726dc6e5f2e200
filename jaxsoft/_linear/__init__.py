"""The losses of a linear head, which never stores its logits."""
