"""``python -m inversion_core.learning``: see `commands.learn`."""

import sys

from ..commands.learn import main

sys.exit(main())
