"""A `datastore.json` that says where rows lie instead of naming files, and who may be asked.

Back ends come by registry: whatever is installed under the entry point group `hf_knn.datastores`
opens the references that name it.
"""

import os
import re
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from ..core.config import Normalization
from ..core.manifest import (
    BLOB_PATTERN,
    FAISS_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    REFERENCE_FORMAT,
    SHA256_PATTERN,
    STORAGE_DTYPES,
    Binding,
    DatastoreError,
    Manifest,
    check_format,
    parse_binding,
    signed_json,
)
from ..core.plain_json import Fields, read_json
from ..core.votes import Metric
from .advice import install
from .backend import RowStore
from .folders import exclusive_lock, write_durably

MILVUS = "milvus"
TOKEN_VARIABLE, URI_VARIABLE = "MILVUS_TOKEN", "HF_KNN_MILVUS_URI"
LOCAL_ENDING = ".db"

ENTRY_POINTS = "hf_knn.datastores"
"""Group of the entry points that bring back ends: name -> class with a classmethod `open`."""

PENDING_NAME = "pending-change.safetensors"
"""File of a checkpoint that says how an interrupted change of its remote rows is taken back."""

_SCHEMES = ("http", "https", "tcp")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_OURS = {MILVUS: "hf_knn.milvus.datastore:MilvusDatastore"}
"""Known without installed metadata too, as in a pushed Space, which holds the sources alone."""


def check_uri(uri: str) -> str:
    """Checks the address of a Milvus server.

    Args:
        uri: `http://host:19530`, `https://…`, with `/database` at the end if it is not the default
            one; or a path that ends in `.db`, which Milvus Lite serves in this process.

    Returns:
        The address; a path is made absolute.

    Raises:
        ValueError: for another scheme, or a password in the address, which would be saved.
    """
    parts = urlsplit(uri)
    if parts.scheme in _SCHEMES and parts.hostname:
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "Expected `uri` without user, password or options, since it is saved with the "
                f"checkpoint; pass `token`, or set {TOKEN_VARIABLE}."
            )
        return uri.rstrip("/")
    if uri.endswith(LOCAL_ENDING) and "://" not in uri:
        return str(Path(uri).expanduser().absolute())
    raise ValueError(
        f"Expected `uri` to be like http://host:19530, or a file of Milvus Lite that ends in "
        f"{LOCAL_ENDING}, but got {uri!r}."
    )


def token_of(token: str | None) -> str:
    """The token for a server that the user named: the one given, else that of `MILVUS_TOKEN`."""
    return os.environ.get(TOKEN_VARIABLE, "") if token is None else token


def check_name(collection: str) -> str:
    """Checks the name of a collection.

    Raises:
        ValueError: for one that Milvus does not allow.
    """
    if not _NAME.fullmatch(collection):
        raise ValueError(
            "Expected `collection` to be letters, digits and underscores, not starting with a "
            f"digit, at most 200, but got {collection!r}."
        )
    return collection


@dataclass(frozen=True)
class DatastoreReference:
    """The content of a `datastore.json` without files.

    Attributes:
        uri: of the Milvus server; it holds no password.
        collection: name of the rows' collection.
        num_rows: how many rows it held.
        fingerprint: of the rows, see `table.combine`.
        dim: width of a row.
        dtype: `float16` or `float32`.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        binding: the checkpoint that it belongs to; None if it was saved alone.
        source: dataset id, revision and split of the rows, as far as known.
        backend: which one opens it, by its name in the registry.
        learned_map: sha256 of the map that rows go through; None without one.
    """

    uri: str
    collection: str
    num_rows: int
    fingerprint: str
    dim: int
    dtype: str
    metric: str
    normalization: str
    binding: Binding | None = None
    source: dict[str, str] = field(default_factory=dict)
    backend: str = MILVUS
    learned_map: str | None = None

    def to_json(self) -> str:
        """The text of `datastore.json`."""
        facts = asdict(self)
        named = {"backend": facts.pop("backend")}  # read first, so it stands first
        values = {"format": REFERENCE_FORMAT, "format_version": FORMAT_VERSION}
        return signed_json(values | named | facts)

    @classmethod
    def parse(cls, values: Any) -> "DatastoreReference":
        """Checks the decoded JSON field by field; nobody is asked.

        Args:
            values: the decoded JSON.

        Raises:
            DatastoreError: naming the field, what was wanted and what was found.
        """
        fields = Fields(values, "")
        check_format(fields, REFERENCE_FORMAT)
        backend = fields.text("backend")
        known = _registry()
        if backend not in known:
            raise fields.wrong("backend", f"{_named(known)} ({_how_to_install()})")
        binding = fields.get("binding")
        try:
            uri, collection = fields.text("uri"), fields.text("collection")
            if backend == MILVUS:  # another back end checks what it understands, when it opens
                uri, collection = check_uri(uri), check_name(collection)
        except ValueError as error:
            raise DatastoreError(f"{MANIFEST_NAME}: {error}") from None
        return cls(
            uri=uri,
            collection=collection,
            num_rows=fields.count("num_rows"),
            fingerprint=fields.matching("fingerprint", SHA256_PATTERN),
            dim=fields.count("dim"),
            dtype=fields.choice("dtype", STORAGE_DTYPES),
            metric=fields.choice("metric", list(Metric)),
            normalization=fields.choice("normalization", list(Normalization)),
            binding=None if binding is None else parse_binding(binding),
            source=fields.texts("source"),
            backend=backend,
            learned_map=fields.sha256_or_none("learned_map"),
        )


class RemoteConsent(NamedTuple):
    """Whether a checkpoint may make us ask the server that it names.

    Attributes:
        trusted: True for the address in the checkpoint, whatever it is.
        uri: an address that the user named, which is asked instead; None takes that of
            `HF_KNN_MILVUS_URI`, if it is set.
        token: of the server. That of `MILVUS_TOKEN` goes to an address that the user named only.
    """

    trusted: bool = False
    uri: str | None = None
    token: str | None = None

    def place_of(self, reference: DatastoreReference) -> tuple[str, str]:
        """The address and token to use.

        Args:
            reference: what the checkpoint says.

        Raises:
            ValueError: without consent, naming the address.
        """
        named = self.uri or os.environ.get(URI_VARIABLE)
        if named:
            return check_uri(named), token_of(self.token)
        if self.trusted:
            return reference.uri, self.token or ""
        raise ValueError(
            "Expected consent to ask a server, since the rows of this checkpoint lie in the "
            f"collection {reference.collection} of {reference.backend.title()} at "
            f"{reference.uri}: pass datastore_uri='…' (or set {URI_VARIABLE}) to name it "
            "yourself, or trust_remote_datastore=True to take that address; load_datastore=False "
            "gives the plain classifier."
        )


def read_manifest(path: Path) -> Manifest | DatastoreReference:
    """Reads and checks a `datastore.json` of either kind.

    Args:
        path: the file.

    Raises:
        DatastoreError: naming the field, what was wanted and what was found.
    """
    values = read_json(path)
    if isinstance(values, dict) and values.get("format") == REFERENCE_FORMAT:
        return DatastoreReference.parse(values)
    return Manifest.parse(values)


def read_reference(folder: Path) -> DatastoreReference:
    """What the `datastore.json` of a folder refers to.

    Args:
        folder: of a checkpoint, or of a datastore that was saved alone.

    Raises:
        DatastoreError: for a damaged one, or a folder that holds the rows itself.
    """
    found = read_manifest(folder / MANIFEST_NAME)
    if not isinstance(found, DatastoreReference):
        raise DatastoreError(
            f"Expected {folder} to refer to Milvus, but it holds the rows itself; open it with "
            "Datastore.load."
        )
    return found


def write_reference(folder: Path, reference: DatastoreReference) -> None:
    """Makes a folder refer to rows elsewhere; those that it held go.

    Args:
        folder: where to; made if needed.
        reference: to the rows.

    Raises:
        OSError: if it could not be written; the version that was there is intact.
    """
    text = reference.to_json().encode()
    with exclusive_lock(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / MANIFEST_NAME, lambda path: path.write_bytes(text))
        for entry in folder.iterdir():
            if BLOB_PATTERN.fullmatch(entry.name) or entry.name == FAISS_NAME:
                entry.unlink()


class RemoteBackend(Protocol):
    """What an entry point of `hf_knn.datastores` names: a class that opens references."""

    def open(self, reference: DatastoreReference, consent: RemoteConsent) -> RowStore:
        """Opens what a reference names, if it is still that and the server may be asked."""
        ...


def open_remote(reference: DatastoreReference, consent: RemoteConsent) -> RowStore:
    """Opens the datastore that a checkpoint refers to, by the back end that it names.

    Args:
        reference: the content of its `datastore.json`.
        consent: whether a server may be asked.

    Raises:
        DatastoreError: for a back end that nobody brought, naming those that are here; or rows
            that are not those of the reference.
        ImportError: for a back end whose own packages are missing, saying what to install.
        ValueError: without consent.
    """
    known = _registry()
    if reference.backend not in known:
        raise DatastoreError(
            f"Expected the rows of {reference.collection} to lie in {_named(known)}, but they lie "
            f"in {reference.backend!r}; {_how_to_install()}."
        )
    backend: RemoteBackend = resolve_name(known[reference.backend])
    return backend.open(reference, consent)


def _registry() -> dict[str, str]:
    """Name -> `module:class` of each back end that is here."""
    return _OURS | {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)}


def _how_to_install() -> str:
    return f"install the extra that brings others, as {install('milvus')} does"


def _named(known: dict[str, str]) -> str:
    return " or ".join(repr(name) for name in sorted(known))


def is_pending(folder: Path) -> bool:
    """Whether a change of a checkpoint's rows is under way, or was interrupted."""
    return (folder / PENDING_NAME).is_file()


def explain_pending(folder: Path) -> str:
    """What to do about it."""
    return (
        f"A change of {folder} is under way, or was interrupted. When nobody changes it now, run "
        f"`hf-knn undo {folder}`: it takes the half-done change back, so that the rows on the "
        "server "
        "are again those of the checkpoint. The next teach, forget or relabel does so too."
    )
