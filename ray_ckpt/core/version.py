"""The one place of the version; a copy of the package that was never installed knows it, too."""

__version__ = "0.1.0"
