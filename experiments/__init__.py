"""The scripts: `python experiments/NAME.py`, or `python -m experiments.NAME`, which this makes work."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
