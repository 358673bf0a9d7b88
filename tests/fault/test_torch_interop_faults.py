"""Fault C11 of docs/reference/failure-modes.md: no page-locked memory on this machine."""

import subprocess
import sys

import pytest
from optional import imported_later

torch = imported_later("torch", reason="torch is not installed")

READ_AND_STAGE = """
import logging
import numpy as np
from dray import PayloadClient, PayloadServer, SharedRingBuffer, make_secret
from dray.payload import torch_interop

logging.basicConfig(format="%(levelname)s %(name)s")
secret = make_secret()
with SharedRingBuffer(4, 1 << 16) as ring, PayloadServer(ring, lane=["shm", "tcp"], secret=secret) as server:
    for lane in ("shm", "tcp"):
        with PayloadClient(lane=lane, secret=secret) as client:
            for number in range(2):
                arrays = client.read(server.put({"a": np.full(5, number, np.float32)}), timeout=10)
                tensors = torch_interop.to_torch(arrays, pin=True)
                print(tensors["a"].tolist(), tensors["a"].is_pinned())
"""


@pytest.mark.skipif("torch.cuda.is_available()", reason="page-locked memory can be had here")
def test_c11_without_page_locked_memory_payloads_are_staged_in_pageable_memory_with_one_warning() -> None:
    done = subprocess.run([sys.executable, "-c", READ_AND_STAGE], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{[float(number)] * 5} False" for number in (0, 1, 0, 1)]
    assert done.stderr.splitlines() == ["WARNING dray.payload"]
