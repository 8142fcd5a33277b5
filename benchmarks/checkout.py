"""The checkout that is measured: the one this file lies in, whatever is installed.

Imported by every benchmark before anything of ``strata``.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "typings"))  # there, strata is this checkout
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(ROOT / "typings"), os.environ.get("PYTHONPATH")))
)
