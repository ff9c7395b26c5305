"""Reads `pytorch_model.bin` without torch and without trusting it.

`torch.save` writes a zip archive: a pickle that describes the tensors, and one file of
raw numbers per storage. Unpickling can run any code, so only the names that rebuild
tensors are let through, and even those stand for plain records of ours: arrays are made
from the records afterwards.
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bert_finetune.errors import UserError

_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LEGACY_ADVICE = (
    "Convert it once where torch is installed: `torch.save(torch.load(path), path)` "
    "writes the current format."
)


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_unused) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_unused) -> _Tensor:
    return tensor


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(d) for name, d in _STORAGE_DTYPES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
    """Resolves the names that rebuild tensors, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"it asks for {module}.{name}, and only tensors are read from it; "
                "nothing was executed. Use a model.safetensors of the same model."
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise UserError(f"it refers to an unknown kind of object, {kind!r}.")
        return _Storage(str(key), storage_type.dtype, int(size))


def read_torch_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict saved by ``torch.save``, by name.

    Raises:
      UserError: for a file that is damaged, in torch's format from before version 1.6,
        or that holds or asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except zipfile.BadZipFile:
        with open(path, "rb") as file:
            is_pickle = file.read(1) == b"\x80"
        if is_pickle:
            problem = (
                "it is in the legacy format of torch before 1.6. " + _LEGACY_ADVICE
            )
        else:
            problem = "it is damaged or not a torch checkpoint. Download it again."
        raise UserError(f"{path} cannot be read: {problem}") from None
    except Exception as error:
        raise UserError(
            f"{path} cannot be read: it is damaged ({error}). Download it again."
        ) from error


def _read_archive(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError("it is a zip archive, but not one that torch.save wrote.")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and (
        archive.read(f"{folder}byteorder") != b"little"
    ):
        raise UserError("it was written on a big-endian machine.")
    state = _TensorUnpickler(io.BytesIO(archive.read(pickles[0]))).load()
    if not isinstance(state, dict):
        raise UserError("it does not hold a state dict.")
    storages: dict[str, np.ndarray] = {}
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise UserError(
                f"entry {name!r} is not a tensor; a state dict of tensors is needed."
            )
        storage = tensor.storage
        if storage.key not in storages:
            data = archive.read(f"{folder}data/{storage.key}")
            storages[storage.key] = np.frombuffer(data, storage.dtype)
        tensors[name] = _as_array(name, tensor, storages[storage.key])
    return tensors


def _as_array(name: str, tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    plausible = len(tensor.shape) == len(tensor.strides) and all(
        isinstance(n, int) and n >= 0 for n in numbers
    )
    if plausible and math.prod(tensor.shape):
        last = sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
        )
        plausible = tensor.offset + last < storage.size
    if not plausible or storage.dtype != tensor.storage.dtype:
        raise UserError(f"tensor {name} reaches outside its storage.")
    return np.lib.stride_tricks.as_strided(
        storage[tensor.offset :],
        tensor.shape,
        [s * storage.itemsize for s in tensor.strides],
    ).copy()
