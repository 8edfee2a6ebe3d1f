"""Self-training, for `ray job submit -- python jobs/self_train.py`: see medray.commands.self_train."""

import sys
from pathlib import Path

# `ray job submit --working-dir .` has no installed medray
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from medray.commands.beginning import end_at_signals

if __name__ == "__main__":
    end_at_signals()  # before the imports that take seconds

    from medray.commands.command_line import ended
    from medray.commands.self_train import main

    sys.exit(ended(main))
