"""The passes over the logits: what each computes, and how a CPU does it faster."""
