"""The `hf-knn` command: declarations only, so that `--help` answers without importing torch.

An option is declared once: as a parameter of its command or, of `train`, as a field of
`TrainOptions`. What a command does is a function of `hf_knn.commands`, imported when it runs.
"""

from .command_line import app, main

__all__ = ["app", "main"]
