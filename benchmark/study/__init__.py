"""What is measured on a task with a backbone, and how a run writes it; built on the catalog."""
