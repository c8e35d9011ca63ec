"""What `import recipes` finds where a recipe is run as a file: Python looks in the file's folder first, so here.

It puts the clone's root in that place, for the recipes and the `hf_sai` beside this file, whatever clone is installed.
"""

import signal
import sys

if __name__ == "recipes":  # until `interrupt.py` is loaded Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib
from pathlib import Path

_folder = Path(__file__).resolve().parent
sys.path[:] = [str(_folder.parent), *(path for path in sys.path if not path or Path(path).resolve() != _folder)]
del sys.modules[__name__]
importlib.import_module(__name__)  # the package takes this module's place
