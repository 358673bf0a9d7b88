import json
from dataclasses import replace

import numpy as np
import pytest

from dray import __version__
from dray.cli.doctor import (
    MachineFacts,
    as_document,
    facts,
    inspect_machine,
    lines,
    needed_lanes,
    rdma_devices,
    remarks,
)
from dray.cli.lane_check import LaneReport, digest
from dray.errors import ConfigError

WORKS = LaneReport("shm", True, "1,048,768 bytes read", "", 1048768, 0.002)
MISSING = LaneReport("ucx", False, "the ucxx package is not installed", "pip install 'dray-rl[ucxx]'")

MACHINE = MachineFacts(
    system="Linux 6.1 x86_64",
    cpus=2,
    python="3.11.7",
    versions={"dray": "0.1.0", "torch": None},
    redis_server=None,
    redis_version="",
    redis_remedies="pip install 'dray-rl[embedded]'",
    rdma_devices=(),
    memlock=None,
    open_files=4096,
    refused_calls=(),
    direct_problem="",
    ucx_variables={"UCX_TLS": "tcp"},
)


def test_shm_and_tcp_are_needed_everywhere_and_ucx_where_it_is_required():
    assert needed_lanes([]) == {"shm", "tcp"}
    assert needed_lanes(["ucx"]) == {"shm", "tcp", "ucx"}


def test_an_unknown_required_lane_is_named_with_those_that_exist():
    with pytest.raises(ConfigError, match="--require = 'rdma' is not allowed: must be one of shm, ucx, tcp"):
        needed_lanes(["rdma"])


def test_line_of_a_missing_lane_has_the_reason_and_the_remedy():
    printed = list(lines([WORKS, MISSING], MACHINE, frozenset({"shm", "tcp"})))
    assert printed[0].startswith("shm: works: ")
    assert printed[1] == "ucx: not available: the ucxx package is not installed; pip install 'dray-rl[ucxx]'"


def test_a_missing_lane_that_is_needed_does_not_work():
    printed = list(lines([MISSING], MACHINE, frozenset({"ucx"})))
    assert printed[0].startswith("ucx: does not work: ")


def test_the_json_form_holds_lanes_machine_and_verdict():
    document = json.loads(json.dumps(as_document([WORKS, MISSING], MACHINE, True)))
    assert document["ok"] is True
    assert document["lanes"]["shm"]["works"] is True
    assert document["lanes"]["ucx"]["remedy"]
    assert document["machine"]["versions"] == {"dray": "0.1.0", "torch": None}


def test_refused_system_calls_are_a_fact_and_a_remark_with_the_remedy():
    refused = replace(MACHINE, refused_calls=("memfd_create", "flock"))
    assert dict(facts(refused))["system calls"] == "refused: memfd_create, flock"
    (remark,) = remarks(refused)
    assert remark.startswith(
        "the system calls memfd_create, flock are refused: they must be allowed by the sandbox"
    )
    assert dict(facts(MACHINE))["system calls"] == "allowed"
    assert list(remarks(MACHINE)) == []


def test_facts_name_the_reason_if_payloads_cannot_be_leased_directly():
    assert dict(facts(MACHINE))["direct leases"] == "possible"
    refused = replace(MACHINE, direct_problem="membarrier is refused (Operation not permitted)")
    assert dict(facts(refused))["direct leases"] == "not possible: membarrier is refused (Operation not permitted)"


def test_facts_name_what_is_absent():
    printed = dict(facts(MACHINE))
    assert printed["torch"] == "not installed"
    assert printed["redis server"] == "none: pip install 'dray-rl[embedded]'"
    assert printed["RDMA devices"] == "none"
    assert printed["UCX_TLS"] == "tcp"


def test_rdma_with_a_limit_on_locked_memory_is_remarked_on():
    assert not list(remarks(MACHINE))
    assert not list(remarks(replace(MACHINE, memlock=8 << 20)))
    (remark,) = remarks(replace(MACHINE, memlock=8 << 20, rdma_devices=("mlx5_0 (ACTIVE)",)))
    assert "ulimit -l" in remark


def test_few_open_files_are_remarked_on():
    (remark,) = remarks(replace(MACHINE, open_files=256))
    assert "ulimit -n" in remark


def test_rdma_devices_are_listed_with_their_ports(tmp_path):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (tmp_path / "rxe0").mkdir()
    assert rdma_devices(tmp_path) == ("mlx5_0 (ACTIVE)", "rxe0")
    assert rdma_devices(tmp_path / "absent") == ()


def test_facts_about_this_machine_have_its_versions():
    machine = inspect_machine()
    assert machine.versions["dray"] == __version__
    assert machine.versions["numpy"] == np.__version__
    assert machine.cpus >= 1


def test_the_digest_covers_names_dtypes_shapes_and_bytes():
    array = np.arange(6, dtype=np.int32)
    same = digest({"a": array})
    assert digest({"a": array.copy()}) == same
    assert digest({"b": array}) != same
    assert digest({"a": array.reshape(2, 3)}) != same
    assert digest({"a": array.view(np.uint32)}) != same
    assert digest({"a": array[::-1]}) != same
