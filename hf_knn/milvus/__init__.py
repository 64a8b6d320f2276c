"""Rows on a Milvus server."""
