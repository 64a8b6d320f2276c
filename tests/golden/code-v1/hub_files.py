"""The files of one revision, in a folder or on the Hub."""

import logging
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

logger = logging.getLogger(__name__)

_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "subfolder")


class HubFiles:
    """Finds files by name, all of one version.

    Args:
        name: a folder or a Hub id.
        options: the options of `from_pretrained` (`revision`, `token`, `cache_dir`, …).

    Attributes:
        revision: the commit all files come from (Hub only).
    """

    def __init__(self, name: str | Path, options: dict[str, Any]) -> None:
        self.name = str(name)
        self.options = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
        places = {key: self.options[key] for key in _OPTIONS[:3] if key in self.options}
        self.revision = resolve_revision(self.name, options.get("revision"), **places)

    @property
    def commit(self) -> str | None:
        """The commit all files come from; None for a folder, or where nobody could be asked."""
        return None if self.is_folder else getattr(self.revision, "resolved", None)

    @property
    def is_folder(self) -> bool:
        """Whether they lie in a folder here."""
        return Path(self.name).is_dir()

    def download_again(self) -> bool:
        """Ignores what was downloaded before, since it was damaged on its way; False if it cannot.

        The client of the Hub compares sizes only.
        """
        if self.is_folder or any(self.options.get(name) for name in _OPTIONS[2:4]):
            return False
        logger.warning("Downloading %s again: a file does not match its hash.", self.name)
        self.options["force_download"] = True
        return True

    def resolve(self, name: str) -> Path | None:
        """Finds a file by name; None if there is none.

        Raises:
            OSError: if there is no such repository or revision, or the download failed.
        """
        try:
            found = cached_file(
                self.name, name, revision=self.revision,
                _raise_exceptions_for_missing_entries=False, **self.options,
            )  # fmt: skip
        except (OSError, ValueError):
            raise
        except Exception as error:  # the HTTP client's own, of whichever client there is
            raise OSError(
                f"Could not get {name} of {self.name}: {error}; nothing was loaded, try again."
            ) from error
        return None if found is None else Path(found)
