"""`python -m model`: see `model.command`."""

import sys

from model.command import main

sys.exit(main())
