"""UNet2DModel: the plain PyTorch network, with the checkpoints' own parameter names."""

from .model import UNet2DModel, UNet2DOutput

__all__ = ["UNet2DModel", "UNet2DOutput"]
