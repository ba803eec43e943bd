"""Every error that treemem raises on purpose.

    TreememError
    ├── InputError            what the user gave cannot be used (a path, a query, an option)
    │   └── UnreadableInput   some files could not be read and `strict` was asked for
    ├── StoreError            a memory cannot be used
    │   ├── NotAMemory        there is no memory at this path
    │   ├── NewerFormat       the memory was written by a later treemem
    │   ├── UnfinishedMemory  its build was interrupted; building again continues it
    │   ├── Conflict          another process has committed to the same branch meanwhile
    │   ├── DamagedMemory     stored data fails its checks
    │   └── OutOfSpace        the disk is full
    ├── ModelError            a model cannot be loaded or gives unusable output
    │   ├── UnknownModel      no such encoder or language model
    │   └── EncoderMismatch   the memory was made with another encoder
    └── MissingPackage        an optional package is needed for this

Each message is one line: what was wrong, where, and what to do.
"""


class TreememError(Exception):
    """Base of all errors that treemem raises on purpose."""


class InputError(TreememError, ValueError):
    """What the user gave cannot be used."""


class UnreadableInput(InputError):
    """Files could not be read and `strict` was asked for."""


class StoreError(TreememError):
    """A memory cannot be used."""


class NotAMemory(StoreError):
    """There is no memory at this path."""


class NewerFormat(StoreError):
    """The memory was written by a later version of treemem."""


class UnfinishedMemory(StoreError):
    """The build of this memory was interrupted."""


class Conflict(StoreError):
    """Another process has committed to the same branch meanwhile."""


class DamagedMemory(StoreError):
    """Stored data fails its checks."""


class OutOfSpace(StoreError):
    """The disk is full."""


class ModelError(TreememError):
    """A model cannot be loaded or gives unusable output."""


class UnknownModel(ModelError):
    """No encoder or language model of this name can be found."""


class EncoderMismatch(ModelError):
    """The memory was made with another encoder."""


class MissingPackage(TreememError, ImportError):
    """An optional package is needed for this."""
