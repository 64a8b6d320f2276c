"""Pushing to the Hub: one commit for everything, and nobody's later commit overwritten."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..core.frozen import Resolve
from ..core.manifest import MANIFEST_NAME, Manifest
from ..core.reading import THUMBNAILS_NAME, HubFiles

try:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
except ImportError as missing:  # transformers needs it too, so that this is a formality
    raise ImportError("Expected huggingface_hub to be installed.") from missing


logger = logging.getLogger(__name__)

CARD_NAME = "README.md"

PAGE_NAME, REPORT_NAME, TRAINING_NAME = "report.html", "report.json", "train-report.json"
"""What was measured, with pictures and places on a disk, and what a training did."""

_CONFLICT = 412

_BRANCHES_OF_OTHERS = "refs/"

KEPT_TO_ONESELF = (
    ".*", "*/.*", "_*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "checkpoint-*",
    "**/checkpoint-*", "*/optimizer*", "runs/*", PAGE_NAME, REPORT_NAME, TRAINING_NAME,
)  # fmt: skip
"""What is never pushed: pickles, hidden files, training checkpoints, reports."""

_REPLACED = ("datastore*", "model*.safetensors*", "training_args.bin", THUMBNAILS_NAME)
"""Remote files that a push deletes unless it brings them: those of an older version."""


class PushConflictError(OSError):
    """The remote branch has moved on; nothing was pushed."""


@dataclass(frozen=True)
class PushTarget:
    """Where a push goes.

    Attributes:
        repo_id: `org/name`, or a name in one's own space.
        private: of a repository that is made by this push; None is the default of the owner.
        token: a token, True for the one that is logged in, None likewise if there is one.
        revision: a branch, made if it is not there; None is `main`.
        create_pr: open a pull request instead of committing to the branch.
        parent_commit: the commit that the branch must be at; None is where it is now.
        repo_type: `model` or `dataset`.
    """

    repo_id: str
    private: bool | None = None
    token: bool | str | None = None
    revision: str | None = None
    create_pr: bool = False
    parent_commit: str | None = None
    repo_type: str = "model"

    def open(self) -> "OpenTarget":
        """Makes repository and branch where they are missing, and notes where the branch is."""
        api = HfApi(token=self.token, library_name="hf_knn")
        repo_id = api.create_repo(
            self.repo_id, private=self.private, repo_type=self.repo_type, exist_ok=True
        ).repo_id
        branch = self.revision or "main"
        if self.revision is not None and not branch.startswith(_BRANCHES_OF_OTHERS):
            api.create_branch(repo_id, branch=branch, repo_type=self.repo_type, exist_ok=True)
        head = api.repo_info(repo_id, revision=branch, repo_type=self.repo_type).sha
        return OpenTarget(self, api, repo_id, branch, head)


@dataclass(frozen=True)
class OpenTarget:
    """A branch of a repository that is there.

    Attributes:
        target: as asked for.
        api: client of the Hub.
        repo_id: with its owner.
        branch: that is pushed to.
        head: the commit it was at when it was opened.
    """

    target: PushTarget
    api: Any
    repo_id: str
    branch: str
    head: str | None

    def holds(self, name: str) -> bool:
        """Whether the branch has a file."""
        where = {"revision": self.head, "repo_type": self.target.repo_type}
        return bool(self.api.file_exists(self.repo_id, name, **where))

    def read_text(self, name: str) -> str | None:
        """A file that is there, as text; None if there is none."""
        if not self.holds(name):
            return None
        where = {"revision": self.head, "repo_type": self.target.repo_type}
        path = self.api.hf_hub_download(self.repo_id, name, **where)
        return Path(path).read_text(encoding="utf-8", errors="replace")

    def push(
        self,
        folder: Path,
        message: str,
        description: str | None = None,
        extra: Sequence[str] = (),
        replaced: Sequence[str] = (),
    ) -> Any:
        """Commits a folder; what the remote has already is not sent again.

        Args:
            folder: a whole version.
            message: of the commit.
            description: of the commit.
            extra: patterns of `KEPT_TO_ONESELF` that are pushed all the same.
            replaced: patterns of further remote files that go unless this push brings them.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            PushConflictError: if the branch is at another commit than it should be.
            HfHubHTTPError: if the Hub refuses.
        """
        expected = self.target.parent_commit or self.head
        if expected != self.head:
            raise self._conflict(expected)
        try:
            return self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                commit_message=message,
                commit_description=description,
                repo_type=self.target.repo_type,
                revision=self.branch,
                create_pr=self.target.create_pr,
                parent_commit=expected,
                ignore_patterns=[name for name in KEPT_TO_ONESELF if name not in extra],
                delete_patterns=[*_REPLACED, *replaced],
            )
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == _CONFLICT:
                raise self._conflict(expected) from error
            raise

    def _conflict(self, expected: str | None) -> PushConflictError:
        return PushConflictError(
            f"Expected {self.branch} of {self.repo_id} to be at commit {expected}, but somebody "
            "has pushed since; nothing was overwritten. Load the new version and push again, pass "
            "parent_commit= with its commit to replace it, or create_pr=True."
        )


class PushedAlone:
    """A datastore that goes to the Hub by itself."""

    def save(self, folder: str | Path) -> object:
        """Writes it into a folder."""
        raise NotImplementedError

    def push_to_hub(
        self, repo_id: str, *, commit_message: str = "Upload datastore",
        private: bool | None = None, token: bool | str | None = None, revision: str | None = None,
        create_pr: bool = False, parent_commit: str | None = None,
    ) -> Any:  # fmt: skip
        """Pushes the datastore in one commit; files that did not change are not sent again.

        It goes to a repository of its own, made if it is not there: one with a model is a
        ValueError, since that goes with `model.push_to_hub`, whose options these are. Returns a
        `huggingface_hub.CommitInfo`; a PushConflictError says that the branch moved on meanwhile.
        """
        target = PushTarget(repo_id, private, token, revision, create_pr, parent_commit)
        return push_alone(target, self.save, commit_message)


def push_alone(target: PushTarget, save: Callable[[Path], object], message: str) -> Any:
    """Pushes what is saved into a fresh folder, to a repository of its own.

    Args:
        target: where to.
        save: writes the files.
        message: of the commit.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        PushConflictError: if the branch moved on meanwhile; nothing was overwritten.
        ValueError: for the repository of a model.
    """
    opened = target.open()
    if opened.holds(CONFIG_NAME):
        raise ValueError(
            f"Expected {opened.repo_id} to be a repository of its own, but it holds a model; "
            "push the model with model.push_to_hub."
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "store"
        save(folder)
        return opened.push(folder, message)


def find_manifest(name: str | Path, options: dict[str, Any]) -> tuple[Manifest, Resolve]:
    """The manifest of a repository on the Hub, and what finds its files, all of one revision.

    Args:
        name: the Hub id of a datastore or of a model that has one.
        options: of `transformers.utils.cached_file`.

    Raises:
        FileNotFoundError: if there is no datastore.
        DatastoreError: for a manifest that is damaged.
        OSError: if there is no such repository or revision, or the download failed.
    """
    files = HubFiles(name, options)
    path = files.resolve(MANIFEST_NAME)
    if path is None:
        raise FileNotFoundError(
            f"Expected {name} to hold a datastore, but it has no {MANIFEST_NAME}."
        )
    return Manifest.read(path), files.resolve
