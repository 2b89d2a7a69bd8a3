"""The version of the installed package, which takes longer to find than the rest of ``import dsconv``."""

from importlib import metadata

__version__ = metadata.version("dsconv")
