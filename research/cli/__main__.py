"""``python -m research.cli`` is ``ablate``."""

import sys

from research.cli import main

sys.exit(main())
