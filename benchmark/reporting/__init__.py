"""What a report says of a folder that a run wrote: figures, tables, sentences, pages."""
