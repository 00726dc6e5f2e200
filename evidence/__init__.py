"""What the promises rest on: `python -m evidence`."""
