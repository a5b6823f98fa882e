"""`python -m pipeline` is `pipeline`."""

import sys

from pipeline.cli import main

sys.exit(main())
