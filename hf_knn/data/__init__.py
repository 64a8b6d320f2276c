"""Pictures and labels, before any model."""
