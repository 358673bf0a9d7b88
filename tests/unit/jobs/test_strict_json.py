"""What dray writes for others to read is JSON, which has no NaN and no infinity."""

import json
from pathlib import Path

import pytest

from dray.files import write_json
from dray.jobs.folder import finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_number_that_is_not_finite_is_refused_and_the_file_stays(tmp_path: Path, value: float) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": value})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]
    write_json(path, finite({"loss": value}))
    assert json.loads(path.read_text()) == {"loss": None}
