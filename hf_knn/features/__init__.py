"""Pictures to features, once."""
