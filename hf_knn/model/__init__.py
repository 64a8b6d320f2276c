"""The package's model: what it can be taught, why it answers, how it is saved."""
