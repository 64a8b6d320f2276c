"""What a server counts, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Measures:
    """The numbers of one server.

    Args:
        paths: those that are counted by their names.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._paths = paths
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "hf_knn_requests", "Requests answered.", ["path", "method", "status"], registry=registry
        )
        self._seconds = Histogram(
            "hf_knn_request_seconds", "From the first byte to the answer.", ["path"],
            registry=registry,
        )  # fmt: skip
        self._pictures = Counter("hf_knn_pictures", "Pictures looked at.", registry=registry)
        self._batches = Histogram(
            "hf_knn_batch_pictures", "Pictures looked at together.", buckets=_BATCHES,
            registry=registry,
        )  # fmt: skip
        self._changes = Counter(
            "hf_knn_changes", "Changes that were saved.", ["action"], registry=registry
        )
        self._waiting = Gauge("hf_knn_requests_waiting", "Requests under way.", registry=registry)
        self._rows = Gauge("hf_knn_rows", "Stored pictures.", registry=registry)
        self._opened = Gauge(
            "hf_knn_opened_again", "Times that another program had changed the checkpoint.",
            registry=registry,
        )  # fmt: skip

    def answered(self, path: str, method: str, status: int, seconds: float) -> None:
        """One request.

        Args:
            path: of it.
            method: of HTTP.
            status: of HTTP.
            seconds: that it took.
        """
        known = path if path in self._paths else "other"  # anybody can think of more
        verb = method if method in ("GET", "POST") else "other"
        self._requests.labels(known, verb, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def looked(self, pictures: int) -> None:
        """Some pictures went through the backbone together."""
        self._pictures.inc(pictures)
        self._batches.observe(pictures)

    def changed(self, action: str) -> None:
        """A change was saved."""
        self._changes.labels(action).inc()

    def text(self, waiting: int, rows: int, opened: int) -> bytes:
        """All of them.

        Args:
            waiting: requests under way.
            rows: of the datastore.
            opened: how often the checkpoint was opened again.
        """
        for gauge, value in ((self._waiting, waiting), (self._rows, rows), (self._opened, opened)):
            gauge.set(value)
        return generate_latest(self._registry)
