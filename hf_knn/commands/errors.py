"""Errors that a user can reach, as sentences: what happened, and what to do."""

import errno
import pickle
import zipfile

import torch
from huggingface_hub.errors import (
    CacheNotFound,
    CorruptedCacheException,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    StrictDataclassError,
)
from safetensors import SafetensorError

EXPECTED: tuple[type[Exception], ...] = (
    OSError, ValueError, ImportError, ArithmeticError, MemoryError, RuntimeError, LookupError,
    SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, HTTPError, CacheNotFound,
    CorruptedCacheException, EntryNotFoundError, NotASafetensorsRepoError, RevisionResolutionError,
    StrictDataclassError,
)  # fmt: skip
"""What files, settings, a network or a machine of somebody can make the libraries raise."""

_ELSEWHERE = (
    "name another: -o for what is written, HF_HOME for caches of the Hub, HF_KNN_CACHE for "
    "features, TMPDIR for temporary files"
)
_LONGEST = 500
"""Characters of a library's message that are shown; some list all models there are."""

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def sentence_of(error: Exception) -> str:
    """What an error says to somebody who does not know the code.

    Args:
        error: one of `EXPECTED`.
    """
    said = str(error).strip() or type(error).__name__
    if said.startswith("Expected "):
        return said
    said = said.rstrip(".") if len(said) <= _LONGEST else said[:_LONGEST].rstrip() + " …"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_about_memory(said):
        return f"not enough memory: {said}; do choose a smaller --batch-size, or fewer pictures."
    if isinstance(error, EntryNotFoundError | HTTPError | OfflineModeIsEnabled):
        return _of_the_hub(error, said)
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error, said)
    if isinstance(error, SafetensorError | zipfile.BadZipFile | pickle.UnpicklingError):
        return f"a file is damaged or not whole: {said}; fetch or make it again."
    if isinstance(error, StrictDataclassError):
        return f"a setting in config.json is not what it has to be: {said}; save the model again."
    if isinstance(error, UnicodeError):
        return f"a file or a name is not the text that it has to be: {said}; save it as UTF-8."
    if isinstance(error, LookupError | RuntimeError | ArithmeticError):
        # it may be a fault of ours: then its place is what helps
        kind = type(error).__name__
        return f"{kind}: {said}. The same line with --debug shows where."
    return f"{said}."


def _is_about_memory(said: str) -> bool:
    return any(words in said.lower() for words in _MEMORY)


def _of_the_hub(error: Exception, said: str) -> str:
    if isinstance(error, GatedRepoError):
        return f"{said}. Ask for access on its page, then log in: hf auth login."
    if isinstance(error, RepositoryNotFoundError):
        return f"{said}. Check the name; log in (hf auth login) if it is private."
    if isinstance(error, RevisionNotFoundError):
        return f"{said}. Check --revision."
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return f"{said}. Go online (unset HF_HUB_OFFLINE), or name a folder."
    if isinstance(error, EntryNotFoundError | HfHubHTTPError):
        return f"{said}."
    return f"the Hub cannot be reached: {said}; check the network, or name a folder."


def _of_the_system(error: OSError, said: str) -> str:
    reason = error.strerror or said
    place = f"{error.filename}: {reason}" if error.filename is not None else reason
    if error.errno in _NO_ROOM:
        return f"{place}; make room there, or {_ELSEWHERE}."
    if error.errno in _NOT_WRITABLE:
        return f"{place}; choose a place that you may use, or {_ELSEWHERE}."
    if isinstance(error, FileNotFoundError) and "temporary directory" in said:
        return f"{said}; set TMPDIR to a folder that can be written."
    return f"{place}."
