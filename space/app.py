"""What a Space runs; in a clone `python -m hf_knn_space` does the same."""

import sys
from pathlib import Path

from hf_knn_space import main

if __name__ == "__main__":
    sys.exit(main(beside=Path(__file__).parent))
