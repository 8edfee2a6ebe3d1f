"""`python -m medray`: see medray.commands.cli."""

import sys

from medray.commands.cli import main

sys.exit(main())
