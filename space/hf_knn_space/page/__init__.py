"""What is shown: the page, its tabs, and how they look."""
