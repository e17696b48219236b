"""What Python imports as it starts where PYTHONPATH names this folder: see `BRIEF` in scripts.py."""

import sys
from pathlib import Path
from typing import Any


class BeforeTraining:
    """Asked where to find each module; says of none."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "llm.training.lifecycle":  # not before: many of these processes never import torch
            sys.path.append(str(Path(__file__).parents[1]))
            from scripts import make_brief, skip_picture

            make_brief()
            skip_picture()


sys.meta_path.insert(0, BeforeTraining)
