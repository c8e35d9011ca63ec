"""As `recipes.py`: where a recipe is run as a file, `import hf_sai` finds this first, and takes that of the clone."""

import importlib
import sys

import recipes  # noqa: F401 (puts the clone's root in front)

del sys.modules[__name__]
importlib.import_module(__name__)
