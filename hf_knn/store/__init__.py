"""Rows that change: the datastore, its index, its files, and the Hub."""
