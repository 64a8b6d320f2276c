"""`python -m hf_knn_cli` is `hf-knn`."""

from . import main

main()
