"""The thread that ends leases whose arrays are gone."""

import threading

import numpy as np
import pytest

from dray.transport.lease_reaper import LeaseReaper


@pytest.mark.parametrize("leases_before", [0, 1])
def test_a_lease_that_was_granted_while_the_client_closed_ends_with_its_array(leases_before: int) -> None:
    reaper = LeaseReaper()
    for _ in range(leases_before):
        ended = threading.Event()
        array = np.zeros(1)
        reaper.watch(array, ended.set)
        del array
        assert ended.wait(30)
    reaper.close()
    ended = threading.Event()
    array = np.zeros(1)
    reaper.watch(array, ended.set)
    assert not ended.is_set()
    del array
    assert ended.wait(30)
