"""The server: who may ask, and one live checkpoint behind it (fastapi and uvicorn here only)."""
