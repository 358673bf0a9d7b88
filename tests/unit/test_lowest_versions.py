import tomllib
from pathlib import Path

import pytest
from lowest_versions import lowest_versions

PROJECT = {
    "name": "made-up",
    "dependencies": ["numpy>=1.26", "typer>=0.15.4,<1"],
    "optional-dependencies": {
        "net": ["httpcore[asyncio]>=1.0.5"],
        "demo": ["made-up[net]", "Some_Tool>=2", "numpy>=2.0"],
        "dev": ["made-up[demo]", "pytest>=8.2", "numpy>=1.26"],
        "odd": ["tool"],
    },
}


def test_each_package_is_pinned_to_its_lower_bound_once_with_its_extras() -> None:
    assert lowest_versions(PROJECT, "dev") == [
        "httpcore[asyncio]==1.0.5",
        "numpy==2.0",
        "pytest==8.2",
        "Some_Tool==2",
        "typer==0.15.4",
    ]


def test_an_extra_that_is_left_out_raises_no_bound() -> None:
    assert lowest_versions(PROJECT, "dev", ["demo"]) == ["numpy==1.26", "pytest==8.2", "typer==0.15.4"]


def test_a_requirement_without_a_lower_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match="tool must have one lower bound"):
        lowest_versions(PROJECT, "odd")


def test_every_requirement_of_dray_has_one_lower_bound() -> None:
    document = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    for extra, requirements in project["optional-dependencies"].items():
        assert len(lowest_versions(project, extra)) >= len(project["dependencies"]), (extra, requirements)
