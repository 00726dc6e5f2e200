"""Soft forms of hard functions."""
