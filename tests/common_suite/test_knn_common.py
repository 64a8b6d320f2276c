"""transformers' own common model tests, run on `KnnForImageClassification`.

They come with its source distribution, which tests/test_transformers_common.py unpacks and puts on
the path; this file is collected in that process only.
"""

import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from tests.test_modeling_common import ModelTesterMixin  # type: ignore[import-not-found]
from torch import nn
from transformers import PreTrainedConfig, ResNetConfig, ViTConfig

from hf_knn import KnnConfig, KnnForImageClassification

BACKBONES: dict[str, PreTrainedConfig] = {
    "vit": ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32,
    ),
    "resnet": ResNetConfig(embedding_size=10, hidden_sizes=[10, 20], depths=[1, 1]),
}  # fmt: skip


class KnnModelTester:
    """Small configurations and inputs, as the common tests ask for them."""

    def __init__(self, family: str) -> None:
        self.family, self.batch_size, self.image_size = family, 3, 16
        self.num_hidden_layers, self.num_attention_heads, self.hidden_size = 2, 4, 16
        self.seq_length, self.is_training = 5, True

    def get_config(self) -> KnnConfig:
        backbone = BACKBONES[self.family].to_dict()
        return KnnConfig(
            backbone_config=backbone, num_labels=3,
            pooling="cls" if self.family == "vit" else "mean",
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[KnnConfig, dict[str, Any]]:
        size = self.image_size if self.family == "vit" else 32
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, size, size)}


class KnnTests(ModelTesterMixin):  # type: ignore[misc]
    """What both families share; what does not apply is skipped with its reason."""

    family: ClassVar[str]
    all_model_classes = (KnnForImageClassification,)
    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}
    test_resize_embeddings = False
    test_torch_exportable = False

    def setUp(self) -> None:
        self.model_tester = KnnModelTester(self.family)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: Any, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        return inputs

    def test_model_get_set_embeddings(self) -> None:
        """Pictures are embedded by patches, not by a table of tokens."""
        if self.family == "resnet":
            self.skipTest("a ResNet has no embeddings")
        model = KnnForImageClassification(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), nn.Module)
        assert model.get_output_embeddings() is None

    def test_correct_missing_keys(self) -> None:
        """What a checkpoint lacks is reported; a bare backbone is opened by `from_backbone`."""
        model = KnnForImageClassification(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            path = Path(folder) / "model.safetensors"
            tensors = load_file(path)
            kept = {name: value for name, value in tensors.items() if not name.startswith("head.")}
            save_file(kept, path, {"format": "pt"})
            _, info = KnnForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert set(info["missing_keys"]) == tensors.keys() - kept.keys()


class ViTKnnTest(KnnTests, unittest.TestCase):
    family = "vit"


class ResNetKnnTest(KnnTests, unittest.TestCase):
    family = "resnet"
    has_attentions = False

    def test_hidden_states_output(self) -> None:
        """As transformers' own test of a ResNet: maps of the stem and of each stage."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = KnnForImageClassification(config).eval()
        for options in ({"output_hidden_states": True}, {}):
            model.config.output_hidden_states = not options
            with torch.no_grad():
                states = model(**inputs, **options).hidden_states
            assert [tuple(state.shape[1:]) for state in states] == [(10, 8, 8)] * 2 + [(20, 4, 4)]

    @unittest.skip("transformers' ResNet has no gradient checkpointing")
    def test_gradient_checkpointing_backward_compatibility(self) -> None: ...

    @unittest.skip("transformers' ResNet has no gradient checkpointing")
    def test_gradient_checkpointing_enable_disable(self) -> None: ...

    @unittest.skip("transformers' ResNet has no gradient checkpointing")
    def test_peft_gradient_checkpointing_enable_disable(self) -> None: ...

    @unittest.skip("transformers' ResNet has no gradient checkpointing")
    def test_training_gradient_checkpointing(self) -> None: ...

    @unittest.skip("transformers' ResNet has no gradient checkpointing")
    def test_training_gradient_checkpointing_use_reentrant_false(self) -> None: ...

    @unittest.skip("transformers' ResNet has no gradient checkpointing")
    def test_training_gradient_checkpointing_use_reentrant_true(self) -> None: ...
