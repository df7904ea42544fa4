"""Import it as `from parts import load_parts`; conftest.py puts this folder on the path."""

from ddim_fast import DDIMPipeline


def load_parts(*args, **options):
    """The network and the scheduler of a stored pipeline."""
    pipe = DDIMPipeline.from_pretrained(*args, **options)
    return pipe.unet, pipe.scheduler
