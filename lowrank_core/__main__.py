"""``python -m lowrank_core`` is ``lowrank``."""

import sys

from lowrank_core.cli import main

sys.exit(main())
