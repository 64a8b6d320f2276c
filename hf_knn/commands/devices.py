"""Where a command computes features: the device that `--device` or `HF_KNN_DEVICE` names."""

import os

import torch
from torch import nn

VARIABLE = "HF_KNN_DEVICE"
AUTO = "auto"


def check_device(name: str) -> torch.device:
    """What a name means on this machine.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, …; `auto` is an NVIDIA GPU if there is one,
            else the processor.

    Raises:
        ValueError: for a device that there is not.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"Expected the device {name} to be there, but: {reason}; choose --device cpu, or "
            "install PyTorch for your GPU (https://pytorch.org/get-started)."
        ) from error


def device_of_process() -> torch.device:
    """The device of this command; one that computes no features names none, and stays on the CPU.

    Raises:
        ValueError: for one that there is not.
    """
    return check_device(os.environ.get(VARIABLE) or "cpu")


def move_to_device(model: nn.Module) -> None:
    """Moves a model to the device of this command.

    Args:
        model: which is changed; its rows stay where they are.

    Raises:
        ValueError: for a device that there is not.
    """
    nn.Module.to(model, device_of_process())


def trains_on_cpu() -> bool:
    """Whether a trainer has to leave a GPU alone that it would take by itself."""
    return os.environ.get(VARIABLE) == "cpu"
