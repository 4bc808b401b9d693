"""`python -m nestloop` is the command `nestloop`."""

import sys

from nestloop.cli import main

sys.exit(main())
