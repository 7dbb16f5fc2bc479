"""Small helper modules that the scripts share, one concept each."""

__version__ = "1.0.0"
