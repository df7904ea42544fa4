"""Files in, configs and tensors out, and back: folders, the Hub, legacy formats, and files of other repositories.

Nothing here knows a network or a scheduler class; `from_pretrained` of each builds itself from what is read here.
"""

from .configs import read_config
from .load import download, is_single_file, read_pipeline, read_scheduler, read_unet
from .lookup import Lookup
from .push import push_to_hub
from .recognized import Recognized
from .save import save_config, save_pipeline, save_scheduler, save_unet
from .single_file import recognize
from .stored import StoredNetwork, StoredPipeline, StoredScheduler
from .training import Training

__all__ = [
    "Lookup",
    "Recognized",
    "StoredNetwork",
    "StoredPipeline",
    "StoredScheduler",
    "Training",
    "download",
    "is_single_file",
    "push_to_hub",
    "read_config",
    "read_pipeline",
    "read_scheduler",
    "read_unet",
    "recognize",
    "save_config",
    "save_pipeline",
    "save_scheduler",
    "save_unet",
]
