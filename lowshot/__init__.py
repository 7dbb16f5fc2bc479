"""Small helper modules that the scripts share, one concept each."""
import importlib.util
import os
import sys

from lowshot.machine import keep_to_quota

__version__ = "1.0.0"

if not importlib.util.find_spec("numpy"):
    # every module here starts with it, before a script could turn an ImportError into one line
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {sys.executable} has no numpy: bash setup.bash makes the environment, "
             "export PATH=$PWD/.venv/bin:$PATH takes it")

KEPT_TO_QUOTA = keep_to_quota()     # before a module loads libraries that make threads
