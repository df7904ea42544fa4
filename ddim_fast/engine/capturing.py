"""The lock of CUDA graph captures."""

import threading

# One capture at a time: the allocator and cuDNN's choice of algorithms are shared by the whole process. Older releases
# of PyTorch also refuse to draw from the device's global generator in one thread while another one captures.
capturing = threading.Lock()
