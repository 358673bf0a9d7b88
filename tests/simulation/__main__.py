"""`python -m simulation`: see `simulation.simulate`."""

import sys

from simulation.simulate import main

sys.exit(main())
