"""The arguments of the C kernels, as `*.c` declares them."""

import ctypes


class Conv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "filters", "residual", "bias", "out", "taps", "scratch")),
        *((name, ctypes.c_int64) for name in ("x_stride", "out_stride", "residual_stride", "bias_stride")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "in_channels", "out_channels")),
        *((name, ctypes.c_int64) for name in ("block", "group", "per_thread")),
        ("divisor", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("side", "kind")),
    ]


class Direct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "filters", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "out_stride", "residual_stride", "bias_stride")),
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "in_channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "out_channels", "stride", "padding")),
        ("divisor", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("kind", "pairs")),
    ]


class Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "filters", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "in_channels", "out_channels", "group")),
        *((name, ctypes.c_int32) for name in ("kind", "out_kind", "pairs")),
    ]


class Digest(ctypes.Structure):
    _fields_ = [("pieces", ctypes.c_void_p), ("digests", ctypes.c_void_p), ("count", ctypes.c_int64)]


class Team(ctypes.Structure):
    _fields_ = [("parallel", ctypes.c_void_p), ("number", ctypes.c_void_p), ("threads", ctypes.c_int64)]


class Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "x2", "weight", "bias", "add", "scale", "shift", "out", "work")),
        *((name, ctypes.c_int64) for name in ("x_stride", "x2_stride", "add_stride", "scale_stride", "shift_stride")),
        *((name, ctypes.c_int64) for name in ("images", "pixels", "channels", "channels2", "groups")),
        *((name, ctypes.c_int64) for name in ("part", "parts", "spans")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("silu", "kind")),
    ]


# By the names under which the library tells their sizes.
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "conv": Conv,
    "digest": Digest,
    "direct": Direct,
    "norm": Norm,
    "product": Product,
}
