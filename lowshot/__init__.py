"""Small helper modules that the scripts share, one concept each."""
import importlib.util
import os
import sys

from lowshot.machine import check_threads, keep_to_quota

__version__ = "1.0.0"


def _show_interrupt(kind, error, where, usual=sys.excepthook):
    if kind is KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
    else:
        usual(kind, error, where)


sys.excepthook = _show_interrupt     # Ctrl-C is one line, also while modules are imported

# what modules here start with, before a script could turn an exception into one line
try:
    check_threads()
    if not importlib.util.find_spec("numpy"):
        raise ValueError(f"{sys.executable} has no numpy: bash setup.bash makes the environment, "
                         "export PATH=$PWD/.venv/bin:$PATH takes it")
except ValueError as e:
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {e}")

KEPT_TO_QUOTA = keep_to_quota()     # before a module loads libraries that make threads
