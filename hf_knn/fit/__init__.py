"""Heads, the blend, and their numbers, from features."""
