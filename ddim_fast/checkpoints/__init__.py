"""Files in, configs and tensors out, and back: folders, the Hub, legacy formats, the original repository.

Nothing here knows a network or a scheduler class; `from_pretrained` of each builds itself from what is read here.
"""

from .load import download, read_pipeline, read_scheduler, read_unet
from .lookup import Lookup
from .original import read_original
from .push import push_to_hub
from .save import save_pipeline, save_scheduler, save_unet
from .stored import StoredNetwork, StoredPipeline, StoredScheduler

__all__ = [
    "Lookup",
    "StoredNetwork",
    "StoredPipeline",
    "StoredScheduler",
    "download",
    "push_to_hub",
    "read_original",
    "read_pipeline",
    "read_scheduler",
    "read_unet",
    "save_pipeline",
    "save_scheduler",
    "save_unet",
]
