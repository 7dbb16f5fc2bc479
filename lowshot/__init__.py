"""Small helper modules that the scripts share, one concept each."""
from lowshot.machine import keep_to_quota

__version__ = "1.0.0"

KEPT_TO_QUOTA = keep_to_quota()     # before a module loads libraries that make threads
