"""The exceptions embtune raises for mistakes a user can mend; every message says what, where, and what to do.

The command line prints any `EmbtuneError` as one message without a traceback. Errors that show a bug in embtune
itself are left as they are (`AssertionError`, `TypeError`, …), so that their traceback survives.
"""


class EmbtuneError(Exception):
    """Base of everything embtune raises on purpose."""


class ArgumentError(EmbtuneError, ValueError):
    """An argument or setting cannot be honoured; the message names it and the remedy."""


class DataError(EmbtuneError, ValueError):
    """A data file or data set cannot be used; the message names file, row and column."""


class ModelError(EmbtuneError, ValueError):
    """A checkpoint cannot be loaded, or a model is not in the state that an operation needs."""


class ExportError(EmbtuneError, RuntimeError):
    """A written model differs from the one that was trained, or its format cannot hold it."""


class MissingPackageError(EmbtuneError, ImportError):
    """An optional package is needed; the message carries the exact pip command."""


class EmbtuneWarning(UserWarning):
    """Something works, but not as asked or not as fast as it could; the message says why."""


class PreflightWarning(EmbtuneWarning):
    """Something odd about the data or the settings of a run, found before its first step."""
