"""What can go wrong."""

import errno


class BkpackError(ValueError):
    """A file breaks a rule of its format, or an argument makes no sense; the text says which and what to do."""


class FileError(BkpackError, OSError):
    """The operating system refused a file operation; `errno` says why."""


class MissingFileError(FileError, FileNotFoundError):
    """A file is not there."""


class OutputExistsError(FileError, FileExistsError):
    """The output exists; pass `force=True` to replace it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.errno = errno.EEXIST


for _class in (BkpackError, FileError, MissingFileError, OutputExistsError):
    _class.__module__ = "bkpack"
