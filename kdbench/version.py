"""The version of this package, for records. Hatch reads it from here too."""

__version__ = "0.1.0"
