"""Checkpoints of format 1, as version 0.1.0 saved them; see tests/golden/make_checkpoints_v1.py."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = sorted(path.name for path in (GOLDEN / "checkpoints-v1").iterdir())
LEGACY_CODE = sorted(path.name for path in (GOLDEN / "code-v1").iterdir())
EXPECTED = "expected.safetensors"


def lay_out(kind: str, folder: Path, *, with_code: bool = True) -> Path:
    """A golden checkpoint as it was saved.

    Args:
        kind: of `KINDS`.
        folder: which is made.
        with_code: also the 51 files that travelled with it.
    """
    shutil.copytree(GOLDEN / "checkpoints-v1" / kind, folder)
    (folder / EXPECTED).unlink()
    if with_code:
        shutil.copytree(GOLDEN / "code-v1", folder, dirs_exist_ok=True)
    return folder


def expected(kind: str) -> dict[str, Tensor]:
    """What version 0.1.0 answered: `pixel_values`, `logits`, `head_logits`, and the neighbours'
    `similarities`, `labels` and `ids` where there are rows."""
    return load_file(GOLDEN / "checkpoints-v1" / kind / EXPECTED)


def assert_as_expected(kind: str, found: dict[str, Tensor]) -> None:
    """Equal rows and classes; numbers up to what another processor rounds differently."""
    wanted = expected(kind)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(found[name], value), name
