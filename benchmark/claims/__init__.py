"""One script per claim of the README that the study does not measure."""
