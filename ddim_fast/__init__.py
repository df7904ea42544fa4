"""A drop-in `DDIMPipeline`, rebuilt for speed: `from ddim_fast import DDIMPipeline`."""

from typing import TYPE_CHECKING

from .pipeline import DDIMPipeline, ImagePipelineOutput
from .scheduler import DDIMScheduler
from .unet import UNet2DModel
from .version import __version__

if TYPE_CHECKING:
    from .generation import generate

__all__ = ["DDIMPipeline", "DDIMScheduler", "ImagePipelineOutput", "UNet2DModel", "__version__", "generate"]


def __getattr__(name: str) -> object:
    # Jobs bring writers and threads along, which a single picture does not need.
    if name == "generate":
        from .generation import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
