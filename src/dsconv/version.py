"""Version of the installed package; looking it up takes longer than the rest of ``import dsconv``."""

from importlib import metadata

__version__ = metadata.version("dsconv")
