"""The image-classification pipeline, with the neighbours that voted."""

from typing import Any, cast

from transformers import ImageClassificationPipeline

from .modeling import KnnForImageClassification

_FIELDS = ("labels", "similarities", "ids")


class KnnImageClassificationPipeline(ImageClassificationPipeline):
    """Classifies pictures and says which training pictures are nearest.

    ``pipeline("image-classification", model=…, pipeline_class=KnnImageClassificationPipeline)``
    takes what the stock pipeline takes, and `neighbors`, how many are returned (5).

    Each answer is ``{"scores": [{"label", "score"}, …], "neighbors": [{"label", "similarity", "id",
    "path"}, …]}``; scores are the blended probabilities, neighbours come nearest first, and `path`
    is None where the datastore does not know it.
    """

    def _sanitize_parameters(  # type: ignore[override]
        self, neighbors: int | None = None, **kwargs: Any
    ) -> Any:
        before, forward, after = super()._sanitize_parameters(**kwargs)
        if neighbors is not None:
            if neighbors < 0:
                raise ValueError(f"Expected `neighbors` to be >= 0, but got {neighbors}.")
            after["neighbors"] = neighbors
        return before, forward, after

    def _forward(self, model_inputs: Any) -> Any:  # type: ignore[override]
        output = self.model(**model_inputs, return_neighbors=True)
        # a batch is taken apart tensor by tensor
        found = {"logits": output.logits}
        if output.neighbors is not None:
            found |= {name: getattr(output.neighbors, name) for name in _FIELDS}
        return found

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: Any,
        function_to_apply: Any = None,
        top_k: int = 5,
        neighbors: int = 5,
    ) -> dict[str, Any]:
        """See the class; called by the pipeline."""
        scores = super().postprocess(model_outputs, function_to_apply, top_k)
        if "labels" not in model_outputs:
            return {"scores": scores, "neighbors": []}
        model = cast(KnnForImageClassification, self.model)
        names, store = model.config.class_names, model.datastore
        assert store is not None  # it has just answered
        labels, similarities, ids = (model_outputs[n][0, :neighbors].tolist() for n in _FIELDS)
        columns = zip(labels, similarities, ids, store.paths_of(ids), strict=True)
        found = [
            {"label": names[label], "similarity": similarity, "id": row_id, "path": path}
            for label, similarity, row_id, path in columns
        ]
        return {"scores": scores, "neighbors": found}
