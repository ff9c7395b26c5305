"""Reads `pytorch_model.bin` without torch and without trusting it.

`torch.save` writes a zip archive: a pickle that describes the tensors, and one file of
raw values per storage. Unpickling can run arbitrary code, so only the names that
rebuild tensors are allowed. They resolve to plain records, from which the arrays are
built afterwards.
"""

import collections
import functools
import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bert_finetune.errors import UserError

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Raised by zipfile, pickle and NumPy for a damaged file.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, OSError),
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError),
    *(TypeError, ValueError),
)


class _Storage(NamedTuple):
    key: str
    dtype_name: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _Tensor(*args[:4]),
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): name for name in _DTYPES},
}


class _TensorUnpickler(pickle.Unpickler):
    """Resolves the names that rebuild tensors, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"it refers to {module}.{name}, but only tensors are read; nothing was "
                "executed. Use a model.safetensors of the same model."
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype_name, key, *_ = pid
        return _Storage(key, dtype_name)


def read_torch_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict saved by ``torch.save``, by name."""
    try:
        with open(path, "rb") as file:
            if file.read(1) == b"\x80":
                raise UserError(
                    "it is in the legacy format of torch before 1.6. Convert it once "
                    "where torch is installed: `torch.save(torch.load(path), path)` "
                    "writes the current format."
                )
            return _read_archive(zipfile.ZipFile(file))
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except _DAMAGE as error:
        raise UserError(
            f"{path} cannot be read: it is damaged or not a torch checkpoint "
            f"({error}). Download it again."
        ) from error


def _read_archive(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError("it is a zip archive, but was not written by torch.save.")
    folder = pickles[0].removesuffix("data.pkl")
    byte_order = f"{folder}byteorder"
    if byte_order in archive.namelist() and archive.read(byte_order) != b"little":
        raise UserError("it was written on a big-endian machine.")
    state = _TensorUnpickler(io.BytesIO(archive.read(pickles[0]))).load()
    if not isinstance(state, dict):
        raise UserError("it does not hold a state dict.")

    @functools.cache
    def read_storage(storage: _Storage) -> np.ndarray:
        data = archive.read(f"{folder}data/{storage.key}")
        return np.frombuffer(data, _DTYPES[storage.dtype_name])

    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise UserError(f"entry {name!r} is not a tensor.")
        tensors[name] = _as_array(name, tensor, read_storage(tensor.storage))
    return tensors


def _as_array(name: str, tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    _, offset, shape, strides = tensor
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    # as_strided does not check bounds.
    if min([offset, *shape, *strides]) < 0 or (0 not in shape and last >= storage.size):
        raise UserError(f"tensor {name} reaches outside its storage.")
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * storage.itemsize for s in strides]
    ).copy()
