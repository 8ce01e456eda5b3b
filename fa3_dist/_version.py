"""The version, once: packaging, the compiled library and `fa3_dist.__version__` read it here."""

__version__ = "0.1.0"
