# SPDX-License-Identifier: Apache-2.0
"""The errors normkit raises: each is also the built-in error that a caller would expect."""


class NormkitError(Exception):
    """Base of every error that normkit raises on purpose."""


class ShapeError(NormkitError, ValueError):
    """Shapes that do not belong together, such as a weight of another length than the last dimension of x."""


class DtypeError(NormkitError, TypeError):
    """A dtype that is not one of float32, bfloat16, float16 and float64, or an argument that is not an array."""


class OptionError(NormkitError, ValueError):
    """An option with a value it cannot have, such as a negative eps or an unknown rounding policy."""


class DeviceError(NormkitError, ValueError):
    """Arrays of one call that live on different devices."""


class UnsupportedError(NormkitError, ValueError):
    """An implementation asked for by name that cannot compute this problem, with its reason."""


class MissingPackageError(UnsupportedError, ImportError):
    """Something that needs a package which is not installed; the message has the pip command."""


class LaunchError(NormkitError, RuntimeError):
    """Kernels that could not be compiled, loaded or launched, with the reason; nothing was written.

    It is the cause of the UnsupportedError that an implementation asked for by name then raises.
    """


class CheckpointError(NormkitError, ValueError):
    """A checkpoint file that cannot be read."""


class MissingTensorError(CheckpointError, KeyError):
    """A tensor that a checkpoint does not hold."""

    # KeyError prints the repr of its argument, which would put the sentence in quotes.
    __str__ = Exception.__str__
