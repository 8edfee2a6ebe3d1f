"""Clinician preference alignment, for `ray job submit -- python jobs/clinician_preference.py`: see
medray.commands.clinician_preference.
"""

import sys
from pathlib import Path

# `ray job submit --working-dir .` has no installed medray
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from medray.commands.beginning import end_at_signals

if __name__ == "__main__":
    end_at_signals()  # before the imports that take seconds

    from medray.commands.clinician_preference import main
    from medray.commands.command_line import ended

    sys.exit(ended(main))
