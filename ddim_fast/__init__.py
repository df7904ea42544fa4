"""A drop-in `DDIMPipeline`, rebuilt for speed."""
