"""`python -m hf_knn_space [CHECKPOINT]`."""

import sys

from . import main

sys.exit(main())
