"""The formulas and the table of functions of the tests, found by their folder as pytest
finds them: they are in no package.
"""

import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))
oracle = importlib.import_module("oracle")
laws = importlib.import_module("laws")
