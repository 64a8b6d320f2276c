"""What travels with a checkpoint, as source: it needs torch and transformers, and no more."""
