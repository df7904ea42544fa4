"""Weights and configs in and out: local folders, the Hub, legacy formats, the original repository."""

from .load import download, load_pipeline_parts, load_scheduler, load_unet
from .original import load_original
from .push import push_to_hub
from .save import save_pipeline, save_scheduler, save_unet

__all__ = [
    "download",
    "load_original",
    "load_pipeline_parts",
    "load_scheduler",
    "load_unet",
    "push_to_hub",
    "save_pipeline",
    "save_scheduler",
    "save_unet",
]
