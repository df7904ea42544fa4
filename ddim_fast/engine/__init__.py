"""How a UNet and a step table become images, fast: packed weights, fused forward, step loop, CUDA graph."""

from .engine import Engine
from .settings import ENGINES, EngineName, EngineSettings

__all__ = ["ENGINES", "Engine", "EngineName", "EngineSettings"]
