"""The errors of zcinfer: what was asked, what was found, and what to do about it.

Every error a user meets derives from `ZcinferError`; an exception of Ray, pickle or torch is only ever its
``__cause__``. Each takes one message, so that it survives the pickling between workers and client.

::

    ZcinferError
    ├── SettingsError           a setting or argument with an impossible value
    ├── ModelError
    │   ├── ModelNotFound       no model of that name, version or digest in the registry
    │   ├── SplitError          the model cannot be taken apart; names the attribute
    │   ├── TrainingModeError   submodules in train mode, where answers depend on the batch
    │   └── ModelCodeMissing    a class of the model cannot be imported in this process
    ├── ArchiveError            truncated, altered or malformed files of a model
    │   └── UntrustedArchive    not known to this user's registry: opening it would run its code
    ├── StoreError
    │   ├── StoreUnavailable    Ray does not answer, or its holder is gone
    │   ├── StoreFull           the model does not fit into shared memory; gives the sizes
    │   └── RemoteUnavailable   the URL of copies cannot be read or written
    ├── NodeError               a machine cannot join a cluster, or has lost it
    ├── InputError              an input the model refuses: dtype, shape, lengths that differ
    ├── OutputError             a target that exists and is not ours, an output without rows
    └── BlockError              a block failed while computing; names block, rows and model version
        └── DeviceLost          and after it the GPU answers nothing more in that process
"""

from __future__ import annotations


class ZcinferError(Exception):
    """Base of all errors raised by zcinfer."""


class SettingsError(ZcinferError):
    """A setting or argument has a value that cannot be used."""


class ModelError(ZcinferError):
    """Something is wrong with a model or its name."""


class ModelNotFound(ModelError):
    """No model of that name, version or digest is registered."""


class SplitError(ModelError):
    """The model cannot be taken apart into skeleton and weights."""


class TrainingModeError(ModelError):
    """Some submodules are in train mode."""


class ModelCodeMissing(ModelError):
    """A class or function of the model cannot be imported in this process."""


class ArchiveError(ZcinferError):
    """The files of a model are truncated, altered or malformed."""


class UntrustedArchive(ArchiveError):
    """The archive is not known to this user's registry; opening it would run code from it."""


class StoreError(ZcinferError):
    """The shared-memory store cannot do what was asked."""


class StoreUnavailable(StoreError):
    """The store does not answer."""


class StoreFull(StoreError):
    """The model does not fit into the store."""


class RemoteUnavailable(StoreError):
    """The URL of copies (``zcinfer.remote``) cannot be read or written."""


class NodeError(ZcinferError):
    """A machine cannot become part of a cluster, or the cluster's head is gone."""


class InputError(ZcinferError):
    """An input array cannot be used with this model."""


class OutputError(ZcinferError):
    """A result cannot be written where, or in the form, it was asked for."""


class BlockError(ZcinferError):
    """A block failed while it was computed."""


class DeviceLost(BlockError):
    """A block failed such that the GPU answers nothing more in that process."""
