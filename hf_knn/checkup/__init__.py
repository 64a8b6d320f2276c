"""What is wrong with a folder or a datastore, and the pages that say so."""
