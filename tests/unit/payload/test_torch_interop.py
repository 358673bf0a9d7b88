import gc
import itertools
import logging
import subprocess
import sys
import weakref

import numpy as np
import pytest
from optional import imported_later

from dray.errors import MissingDependencyError, PayloadFormatError
from dray.payload import PayloadSchema, Ragged, TensorSpec, pack, torch_interop, unpack
from dray.payload.schema import DTYPES

torch = imported_later("torch", reason="torch is not installed")

TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


def dtype(name):
    return getattr(torch, TORCH_DTYPES[name])


@pytest.fixture
def fresh_warning(monkeypatch):
    monkeypatch.setattr(torch_interop, "pageable_warnings", itertools.count())


@pytest.mark.parametrize("shape", [(), (0, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_tensors_of_every_dtype_go_into_a_payload_and_come_back(name, shape):
    tensor = torch.ones(shape).to(dtype(name))
    arrays = unpack(pack({"x": tensor}))
    assert arrays["x"].dtype == DTYPES[name]
    assert np.array_equal(arrays["x"].astype("c8"), np.ones(shape, "c8"))
    back = torch_interop.to_torch(arrays)["x"]
    assert back.dtype is dtype(name)
    assert back.shape == shape
    assert torch.equal(back.to(torch.complex64), tensor.to(torch.complex64))


def test_a_schema_covers_every_torch_dtype_of_the_table():
    assert TORCH_DTYPES.keys() == DTYPES.keys()


def test_gradients_strides_and_conjugation_do_not_matter():
    leaf = torch.arange(6.0).reshape(2, 3).requires_grad_()
    arrays = unpack(
        pack(
            {
                "gradient": leaf * 2,
                "parameter": torch.nn.Parameter(torch.ones(2)),
                "transposed": leaf.t(),
                "strided": torch.arange(10, dtype=torch.bfloat16)[::3],
                "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
                "negative": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
            }
        )
    )
    assert arrays["gradient"].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert arrays["parameter"].tolist() == [1, 1]
    assert arrays["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert arrays["strided"].tolist() == [0, 3, 6, 9]
    assert arrays["conjugate"].tolist() == [1 - 2j]
    assert arrays["negative"].tolist() == [-2]


def test_a_dense_tensor_on_the_host_is_not_copied():
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.zeros(3, dtype=dtype)
        torch_interop.to_numpy(tensor)[:] = 1
        assert tensor.tolist() == [1, 1, 1]


def test_a_tensor_is_narrowed_with_a_warning(caplog):
    schema = PayloadSchema({"x": TensorSpec("F32", (None,))})
    assert schema.check({"x": torch.ones(2, dtype=torch.float64)})["x"].dtype == np.float32
    assert ["'x' is narrowed" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")],
    ids=["sparse", "meta"],
)
def test_a_tensor_that_is_no_array_is_an_error_that_names_the_field(tensor):
    with pytest.raises(PayloadFormatError, match="'odd' cannot be read as an array"):
        pack({"odd": tensor})


def test_writable_arrays_share_memory_with_their_tensors_and_are_kept_alive():
    root = np.frombuffer(pack({"x": np.zeros(3), "b": torch.zeros(3, dtype=torch.bfloat16)}), np.uint8)
    arrays = unpack(root)
    tensors = torch_interop.to_torch(arrays)
    tensors["x"][0] = 5
    tensors["b"][0] = 6
    assert arrays["x"][0] == 5
    assert arrays["b"][0] == 6
    alive = weakref.ref(root)
    del arrays, root
    for name in ("x", "b"):
        assert alive() is not None
        del tensors[name]
    gc.collect()
    assert alive() is None


def test_tensors_of_a_read_only_payload_are_copies_that_may_be_written():
    arrays = unpack(bytes(pack({name: np.ones(3).astype(dtype) for name, dtype in DTYPES.items()})))
    tensors = torch_interop.to_torch(arrays)
    assert set(tensors) == set(DTYPES)
    for name, tensor in tensors.items():
        tensor.zero_()
        assert arrays[name].astype("c8").tolist() == [1, 1, 1]


def test_arrays_that_torch_cannot_share_are_copied():
    arrays = {
        "reversed": np.arange(3)[::-1],
        "strided": np.arange(6)[::2],
        "big-endian": np.arange(3, dtype=">f4"),
    }
    tensors = torch_interop.to_torch(arrays)
    assert tensors["reversed"].tolist() == [2, 1, 0]
    assert tensors["strided"].tolist() == [0, 2, 4]
    assert tensors["big-endian"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_tensors_on_another_device_are_made_from_read_only_arrays(name):
    arrays = unpack(bytes(pack({"x": np.ones((3, 2)).astype(DTYPES[name])})))
    tensor = torch_interop.to_torch(arrays, "meta")["x"]
    assert (tensor.device.type, tensor.dtype, tensor.shape) == ("meta", dtype(name), (3, 2))


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_the_alias_of_a_read_only_array_shows_the_same_bytes_and_keeps_it_alive(name):
    root = np.frombuffer(bytes(pack({"x": np.ones(3).astype(DTYPES[name])})), np.uint8)
    array = unpack(root)["x"]
    alive = weakref.ref(root)
    alias = torch_interop.writable_alias(array)
    assert alias.flags.writeable
    assert (alias.dtype, alias.tobytes()) == (array.dtype, array.tobytes())
    del array, root
    assert alive() is not None
    assert torch_interop.writable_alias(alias) is alias
    del alias
    assert alive() is None


@pytest.mark.skipif("torch.cuda.is_available()", reason="page-locked memory can be had here")
def test_without_page_locked_memory_pageable_memory_is_used_with_one_warning(caplog, fresh_warning):
    arrays = unpack(bytes(pack({name: np.ones(3).astype(dtype) for name, dtype in DTYPES.items()})))
    for _ in range(2):
        tensors = torch_interop.to_torch(arrays, pin=True)
        for name, tensor in tensors.items():
            assert tensor.dtype is dtype(name)
            assert tensor.to(torch.complex64).tolist() == [1, 1, 1]
    assert [(record.name, record.levelno) for record in caplog.records] == [("dray.payload", logging.WARNING)]
    assert torch_interop.to_torch(arrays, "meta", pin=True)["F32"].device.type == "meta"


@pytest.mark.skipif("not torch.cuda.is_available()", reason="no CUDA device")
def test_tensors_on_a_cuda_device_go_into_a_payload_and_come_back():
    tensor = torch.arange(6, device="cuda", dtype=torch.bfloat16).reshape(2, 3)
    arrays = unpack(bytes(pack({"x": tensor.t()})))
    for pin in (False, True):
        back = torch_interop.to_torch(arrays, "cuda", pin=pin)["x"]
        assert torch.equal(back, tensor.t())
    assert torch_interop.to_torch(arrays, pin=True)["x"].is_pinned()


def jagged(dtype=torch.float32):
    return torch.nested.nested_tensor_from_jagged(torch.arange(5).to(dtype), torch.tensor([0, 2, 2, 5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jagged_tensors_are_ragged_arrays_and_come_back(dtype):
    values = unpack(pack({"turns": jagged(dtype), "info": {"turns": jagged(dtype), "text": "x", "n": [1, 2]}}))
    assert isinstance(values["info"]["turns"], Ragged)
    tensors = torch_interop.to_torch(values)
    for back in (tensors["turns"], tensors["info"]["turns"]):
        assert back.is_nested
        assert back.dtype is dtype
        assert [row.tolist() for row in back.unbind()] == [[0, 1], [], [2, 3, 4]]
    assert (tensors["info"]["text"], tensors["info"]["n"]) == ("x", [1, 2])


def test_a_jagged_tensor_with_gaps_is_carried_without_them():
    padded = torch.nested.nested_tensor_from_jagged(
        torch.arange(6.0), torch.tensor([0, 3, 6]), lengths=torch.tensor([1, 2])
    )
    assert [row.tolist() for row in unpack(pack({"x": padded}))["x"]] == [[0], [3, 4]]


def test_a_jagged_tensor_that_differs_in_another_dimension_is_refused():
    with pytest.raises(PayloadFormatError, match="transpose it"):
        pack(
            {"x": torch.nested.nested_tensor_from_jagged(torch.zeros(5, 2), torch.tensor([0, 5])).transpose(1, 2)}
        )


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dray-rl\[torch\]'"):
        torch_interop.to_torch({})
    assert not torch_interop.is_tensor(np.zeros(1))


def test_packing_and_unpacking_do_not_import_torch():
    program = (
        "import sys, numpy, dray.payload, dray.payload.trajectory\n"
        "dray.payload.unpack(dray.payload.pack({'x': numpy.zeros(2), 'y': [1]}))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
