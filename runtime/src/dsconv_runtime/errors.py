"""Errors that a user can mend, of the names that they have in dsconv."""


class DSConvError(Exception):
    """A mistake that the user can mend."""


class FileFormatError(DSConvError, ValueError):
    """A file is no compiled network, is damaged, or was written for a newer version."""


class DataError(DSConvError, ValueError):
    """Arrays cannot be used as given."""
