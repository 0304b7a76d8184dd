"""`python -m tuner`."""

import sys
from pathlib import Path

if not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parents[1]:
    del sys.path[0]  # the current directory, whose storage.py is not ours

from tuner.cli import main

main()
