"""The documentation agrees with the code about modules, states, bytes, keys and bounds."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import struct
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

import dray
from dray import PayloadServer
from dray.cli.slurm import slurm
from dray.jobs import config
from dray.jobs.controller import app, state
from dray.jobs.controller import page as controller_page
from dray.jobs.controller.history import FIGURES, RATE_SECONDS
from dray.jobs.controller.metrics import FAMILIES
from dray.jobs.exit_codes import ExitCode, meaning
from dray.jobs.launch import shutdown
from dray.jobs.launch.processes import is_restarted
from dray.jobs.messages import view
from dray.jobs.process import WATCHED
from dray.jobs.queue import JobKeys
from dray.jobs.replica import delivery, heartbeat
from dray.jobs.slurm import run_state
from dray.protocol import frames, handshake
from dray.ring import OnFull, RingStatistics, attachment, direct, layout, membarrier, slot_state

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for where in ("*.md", "docs/**/*.md", "examples/*/*.md", "benchmarks/*.md") for path in ROOT.glob(where)
)


def page(name: str) -> str:
    return (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def drawing(docstring: str | None, first: str, last: str) -> list[str]:
    """The lines of a drawing in a docstring, without indentation."""
    assert docstring is not None
    lines = inspect.cleandoc(docstring).splitlines()
    begin = next(index for index, line in enumerate(lines) if first in line)
    end = next(index for index in range(begin, len(lines)) if last in lines[index])
    return [line.strip() for line in lines[begin : end + 1]]


def test_architecture_names_every_module_once_and_no_other() -> None:
    sources = ROOT / "src" / "dray"
    text = page("architecture.md")
    table = rows(text[text.index("## Rooms") : text.index("### Layers")])[1:]
    named = {
        room.strip("`").removeprefix("dray/"): re.findall(r"`(\w+)`", modules) for room, _, modules, _ in table
    }
    rooms = (
        "",
        "payload/",
        "ring/",
        "protocol/",
        "transport/",
        "transport/lanes/",
        "prefetch/",
        "agent/",
        "streams/",
        "integrations/",
        "ucxx/",
        "recording/",
        "jobs/",
        "jobs/messages/",
        "jobs/queue/",
        "jobs/controller/",
        "jobs/replica/",
        "jobs/launch/",
        "jobs/slurm/",
        "cli/",
    )
    for room in rooms:
        existing = [path.stem for path in (sources / room).glob("*.py") if not path.stem.startswith("__")]
        assert sorted(named.pop(room)) == sorted(existing), f"modules of dray/{room}"
    assert named == {}
    mentioned = re.findall(r"`((?:[a-z]+/)+\w+\.py)`", text)
    assert [name for name in mentioned if not (sources / name).is_file()] == []


def test_layers_in_the_page_on_architecture_are_those_that_are_checked() -> None:
    text = page("architecture.md")
    drawings = re.findall(r"```\n(.*?)\n```", text[text.index("### Layers") :], re.DOTALL)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = [each["layers"] for each in contracts if each["type"] == "layers"]
    assert [drawn.splitlines() for drawn in drawings[: len(layers)]] == layers


def test_contributing_names_modules_and_what_is_in_them() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    adding = text.split("## Adding a lane")[1].split("\n## ")[0]
    modules = re.findall(r"`([\w<>/]+/[\w<>]+\.py)`", adding)
    missing = [each for each in modules if "<" not in each and not (ROOT / "src" / "dray" / each).is_file()]
    assert missing == []
    named = re.findall(r"`([\w/]+)/(\w+)\.py`[^`]*\(`([\w.]+)`\)", adding)
    assert len(named) >= 1
    for package, module, name in named:
        found: object = importlib.import_module(f"dray.{package.replace('/', '.')}.{module}")
        for part in name.split("."):
            found = getattr(found, part)


def test_diagram_of_slot_states_is_that_of_the_table() -> None:
    (diagram,) = re.findall(r"```mermaid\n(.*?)\n```", page("ring.md"), re.DOTALL)
    assert diagram == slot_state.diagram()


def test_diagram_of_a_payloads_life_cycle_is_that_of_the_table() -> None:
    assert delivery.diagram() in re.findall(r"```mermaid\n(.*?)\n```", page("runtime.md"), re.DOTALL)


def test_diagram_of_run_states_is_that_of_the_table() -> None:
    (diagram,) = re.findall(r"```mermaid\n(.*?)\n```", page("slurm.md"), re.DOTALL)
    lines = ["stateDiagram-v2", f"    [*] --> {run_state.RunState.SUBMITTED.name}: submit"]
    for source, events in run_state.TRANSITIONS.items():
        targets: dict[run_state.RunState, list[str]] = {}
        for event, target in events.items():
            targets.setdefault(target, []).append(event.value)
        lines += [f"    {source.name} --> {target.name}: {', '.join(each)}" for target, each in targets.items()]
    lines += [f"    {each.name} --> [*]" for each in run_state.RunState if each.is_final]
    assert diagram.splitlines() == lines


def test_every_event_of_a_run_is_explained() -> None:
    text = page("slurm.md")
    table = rows(text[text.index("| event |") : text.index("- **Time limit.**")])[1:]
    assert [row[0] for row in table] == [event.value for event in run_state.RunEvent]


def test_bounds_in_the_page_on_slurm_are_those_of_the_code() -> None:
    table = [row for row in rows(page("slurm.md")) if row[-1].startswith("`dray.")]
    assert len(table) == 3
    for what, value, where in table:
        assert pkgutil.resolve_name(where.strip("`")) == float(value), what


def test_options_in_the_page_on_slurm_are_those_of_the_command() -> None:
    text = page("slurm.md")
    documented = set(re.findall(r"`(--[a-z-]+)", text[text.index("| option |") : text.index("## Layout")]))
    offered = {
        name for each in get_command(slurm).commands["submit"].params for name in each.opts + each.secondary_opts
    }  # type: ignore[attr-defined]
    assert documented == {name for name in offered if name.startswith("--")}


def test_example_on_the_ring_page_works() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", page("ring.md"), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["received"] == b"hello"


def test_every_field_of_the_ring_statistics_is_explained() -> None:
    text = page("ring.md")
    explained = [name for row in rows(text[text.index("| field |") :]) for name in re.findall(r"`(\w+)`", row[0])]
    assert explained == [field.name for field in dataclasses.fields(RingStatistics)]


def test_policies_of_a_full_ring_are_those_of_the_code() -> None:
    explained = [re.findall(r'^`"(\w+)"`', row[0]) for row in rows(page("ring.md")) if row[0].startswith('`"')]
    assert [name for names in explained for name in names] == list(get_args(OnFull))


def test_every_slot_event_is_explained() -> None:
    explained = [row[0] for row in rows(page("ring.md")) if row[0].upper() in slot_state.SlotEvent.__members__]
    assert explained == [event.name.lower() for event in slot_state.SlotEvent]


def test_drawing_of_the_segment_is_that_of_the_layout() -> None:
    drawn = drawing(layout.__doc__, "segment    ", "slot 1")
    left = [line.split("          ")[0].rstrip() for line in drawn]
    shown = [line.strip() for line in page("memory-layout.md").splitlines()]
    assert all(any(line.startswith(part) for line in shown) for part in left)


def test_drawing_of_the_phases_is_that_of_the_module() -> None:
    assert "\n".join(drawing(state.__doc__, "QUORUM", "STOP")[:1]) in page("runtime.md")
    for line in drawing(state.__doc__, "STARTING", "FAILED"):
        assert line in page("runtime.md")


def fields(code: struct.Struct) -> list[tuple[int, str]]:
    """(offset, type) of each field of a struct, as the tables write them."""
    kinds = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64"}
    found, at = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", code.format):
        if kind in "sx":
            found.append((at, f"{count}s"))
            at += int(count)
        else:
            for _ in range(int(count or 1)):
                found.append((at, kinds[kind]))
                at += struct.calcsize(f"<{kind}")
    assert at == code.size
    return found


@pytest.mark.parametrize(
    ("begin", "end", "code"),
    [
        ("HELLO, 64 bytes", "CHALLENGE, 128 bytes", handshake.HELLO),
        ("CHALLENGE, 128 bytes", "PROOF is 32 bytes", handshake.CHALLENGE),
        ("ATTACH, 64 bytes", "WELCOME, 8 bytes", handshake.ATTACH),
        ("WELCOME, 8 bytes", "| verdict | in |", handshake.WELCOME),
        ("## Frames", "Empty fields are zero", frames.FRAME),
    ],
)
def test_offsets_of_messages_are_those_of_the_structs(begin: str, end: str, code: struct.Struct) -> None:
    text = page("protocol.md")
    table = rows(text[text.index(begin) : text.index(end)])[1:]
    assert [(int(row[0]), row[2]) for row in table] == fields(code)


def test_fields_of_a_frame_have_the_names_and_numbers_of_the_code() -> None:
    text = page("protocol.md")
    table = rows(text[text.index("## Frames") : text.index("Empty fields are zero")])
    assert tuple(row[1] for row in table[1:]) == frames.Frame._fields
    kinds = dict(zip(table[0][3:], map(int, table[1][3:]), strict=True))
    of_streams = rows(text[text.index("## Streams") : text.index("The stream words are")])
    kinds |= {row[0]: int(row[1]) for row in of_streams if row[1].isdecimal()}
    assert kinds == {kind.name: kind.value for kind in frames.Kind}
    statuses = re.findall(r"^\| (\d) ([A-Z]+) \|", text, re.MULTILINE)
    assert {name: int(number) for number, name in statuses} == {each.name: each.value for each in frames.Status}


def test_sizes_and_version_in_the_protocol_page_are_those_of_the_code() -> None:
    text = page("protocol.md")
    assert f"Version {frames.VERSION}." in text
    assert (handshake.HELLO.size, handshake.CHALLENGE.size, handshake.PROOF.size) == (64, 128, 32)
    assert (handshake.ATTACH.size, handshake.WELCOME.size, frames.FRAME_BYTES) == (64, 8, 64)
    assert f"one message of {handshake.PROOF.size + handshake.ATTACH.size} bytes" in " ".join(text.split())
    assert f"with version {handshake.DIRECT_VERSION}, a client can ask" in text
    assert f"at most {frames.MAX_TEXT_BYTES} bytes" in text


def test_flags_of_the_handshake_in_the_protocol_page_are_those_of_the_code() -> None:
    text = page("protocol.md")
    flags = [row for row in rows(text[: text.index("## Frames")]) if row[1:2] == ["flags"]]
    numbers = [[int(number) for number in re.findall(r"(\d+): ", row[3])] for row in flags]
    hello, welcome = handshake.HelloFlag, handshake.WelcomeFlag
    assert numbers == [[hello.SECRET, hello.DIRECT, hello.BODIES]] * 2 + [[welcome.ATTACHED, welcome.NEWEST]]


def test_descriptors_of_an_attachment_are_those_of_the_code() -> None:
    text = page("protocol.md")
    table = rows(text[text.index("| | descriptor | |") : text.index("`kernel` is BLAKE2b")])[1:]
    assert [int(row[0]) for row in table] == list(range(1, len(attachment.SENT) + 1))
    assert [row[1] for row in table] == list(attachment.SENT)


def test_limits_of_direct_leases_in_the_protocol_page_are_those_of_the_code() -> None:
    text = " ".join(page("protocol.md").split())
    assert f"slots × readers is above {direct.MAX_BOARD_WORDS}" in text
    assert f"the process has {direct.MAX_ATTACHMENTS_OF_PROCESS} attachments to this ring already," in text
    assert f"or the ring {direct.MAX_ATTACHMENTS};" in text
    assert f"takes more than {membarrier.MAX_SECONDS * 1000:g} ms" in text
    assert f"at most every {attachment.OWNER_CHECK_SECONDS * 1000:g} ms" in text


def test_bounds_in_the_page_on_lanes_are_those_of_the_code() -> None:
    table = [row for row in rows(page("lanes.md")) if row[-1].startswith("`dray.")]
    assert len(table) >= 9
    for what, value, where in table:
        assert pkgutil.resolve_name(where.strip("`")) == float(value), what


def test_defaults_of_the_server_are_those_of_the_code() -> None:
    parameters = inspect.signature(PayloadServer).parameters
    table = [row for row in rows(page("lanes.md")) if row[0].startswith("`") and row[0].strip("`") in parameters]
    assert len(table) == 6
    for name, default, _ in table:
        assert parameters[name.strip("`")].default == float(default), name


def written(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value is None else f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def test_every_key_of_a_job_file_is_documented_with_default_and_what_is_allowed() -> None:
    documented: dict[str, list[list[str]]] = {}
    for section in page("configuration.md").split("\n## ")[1:]:
        documented[section.splitlines()[0].strip("`[]")] = rows(section)[1:]
    for name, table in config.JobConfig.model_fields.items():
        kind = getattr(config, f"{name.capitalize()}Table")
        expected = []
        for key, field in kind.model_fields.items():
            default = "required" if field.is_required() else "empty" if field.default_factory else None
            expected.append([f"`{key}`", default or written(field.default), field.description])
        assert [row[:3] for row in documented[name]] == expected, table


def test_exit_codes_are_those_of_the_code() -> None:
    assert ExitCode.__doc__ is not None
    assert all(line.strip() in page("runtime.md") for line in ExitCode.__doc__.splitlines())
    documented = {int(row[0]) for row in rows(page("runtime.md")) if row[0].isdecimal()}
    assert documented == {code.value for code in ExitCode}


def test_signals_on_the_runtime_page_are_those_that_end_a_run() -> None:
    text = page("runtime.md")
    table = rows(text[text.index("| signal to `dray run` |") : text.index("Children end with their supervisor")])[
        1:
    ]
    documented = {
        name: int(code)
        for names, _, codes in table
        for name, code in zip(names.split(", "), codes.split(", "), strict=True)
        if code.isdecimal()
    }
    assert documented == {number.name: 128 + number for number in WATCHED}


def test_exit_codes_after_which_a_policy_group_is_restarted_are_those_of_the_code() -> None:
    text = page("runtime.md")
    table = rows(text[text.index("| exit code | of a policy replica |") : text.index("## On several nodes")])[1:]
    restarted = {(True, True): "yes", (False, True): "in a group of several", (False, False): "no"}
    expected = [
        [f"{code:d}", meaning(code), restarted[is_restarted([code], 1), is_restarted([code], 2)]]
        for code in ExitCode
    ]
    assert table[: len(expected)] == expected
    assert [row[::2] for row in table[len(expected) :]] == [["any other", "yes"], ["a signal", "yes"]]


def test_timeouts_on_the_runtime_page_are_those_of_the_code() -> None:
    text = page("runtime.md")
    table = rows(text[text.index("## Timeouts") : text.index("## Exit codes")])[1:]
    seen = set()
    for what, bound, where in table:
        name = where.strip("`")
        if name.startswith("dray."):
            module, _, attribute = name.rpartition(".")
            assert getattr(importlib.import_module(module), attribute) == float(bound), what
        else:
            section, _, key = name.partition(".")
            kind = getattr(config, f"{section.capitalize()}Table")
            assert kind.model_fields[key].default == float(bound), what
            seen.add(name)
    assert {f"timeouts.{key}" for key in config.TimeoutsTable.model_fields} <= seen


def test_metric_families_on_the_runtime_page_are_those_of_the_code() -> None:
    table = [row for row in rows(page("runtime.md")) if row[0].startswith("`dray_")]
    assert table == [
        [f"`{each.name}`", each.kind, ", ".join(f"`{label}`" for label in each.labels), each.help]
        for each in FAMILIES
    ]


def test_figures_and_bounds_of_the_view_on_the_runtime_page_are_those_of_the_code() -> None:
    text = page("runtime.md").split("### The page\n")[1].split("What lies in Redis, key by key,")[0]
    assert dict(rows(text)[1:]) == {f"`{name}`": words for name, words in FIGURES.items()}
    assert f"Rates are over the last steps, and at least {RATE_SECONDS:g} s." in text
    shown = " ".join(text.split())
    assert f"at most {view.MAX_POINTS} points of each figure, {view.MAX_MEMBERS_SHOWN} replicas" in shown
    assert f"{view.MAX_LOG_LINES} log lines of the {app.MAX_LOGS} logs that were written last" in shown
    more = (view.MAX_METRICS_SHOWN, view.MAX_WARNINGS_SHOWN, view.MAX_STALLS)
    assert "{} metrics, {} warnings and {} stalls".format(*more) in shown
    assert (
        f"good once and for {controller_page.TOKEN_SECONDS:g} s. At most {controller_page.MAX_TOKENS} wait"
        in shown
    )
    assert f"After {controller_page.MAX_WRONG} attempts" in shown
    assert f"{controller_page.MAX_COOKIES} browsers may have one" in shown


def test_table_of_the_teardown_is_that_of_the_module() -> None:
    assert shutdown.__doc__ is not None
    for line in shutdown.__doc__.splitlines():
        if line.startswith("|"):
            assert line in page("runtime.md")


def test_bounds_of_the_end_are_those_of_the_module() -> None:
    assert heartbeat.__doc__ is not None
    for line in heartbeat.__doc__.splitlines():
        if line.startswith("|"):
            assert line in page("runtime.md")


def test_keys_in_redis_are_those_of_the_module() -> None:
    assert list(JobKeys("job").every) == [
        row[0].strip("`") for row in rows(page("control-plane.md")) if row[0].startswith("`dray:")
    ]


def test_every_dependency_is_justified_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    packages = {re.split(r"[<>=\[;]", each)[0] for each in wanted} - {"dray-rl"}
    text = page("dependencies.md")
    assert [package for package in packages if package not in text] == []
    # Frameworks are pinned where their environments are described.
    files = [ROOT / "constraints.txt", *ROOT.glob("tests/integrations/*/requirements*.txt")]
    pin = re.compile(r"^(?:# without dependencies: )?([A-Za-z0-9_.-]+)(?:\[.*\])?==", re.MULTILINE)
    pinned = {name for file in files for name in pin.findall(file.read_text(encoding="utf-8"))}
    without = {package.replace("-", "_").lower() for package in packages} - {"ucxx_cu12", "libucx_cu12"}
    assert without - {name.replace("-", "_").lower() for name in pinned} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_hyperlinks_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
        place = path.parent / target if target else path
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_files_exist(path: Path) -> None:
    for name in re.findall(r"`((?:src|tests|docs|examples)/[\w/.*-]+)`", path.read_text(encoding="utf-8")):
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_every_page_is_in_the_navigation_of_the_documentation_and_in_the_index_of_its_folder() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted(ROOT.glob("docs/**/*.md"))]
    assert sorted(navigated(project["nav"])) == pages
    for index in ROOT.glob("docs/*/**/index.md"):
        text = index.read_text(encoding="utf-8")
        assert [
            path.name for path in index.parent.glob("*.md") if path != index and f"({path.name})" not in text
        ] == []


def navigated(entries: list[Any]) -> list[str]:
    """The pages in a navigation, from the first to the last."""
    found: list[str] = []
    for entry in entries:
        if isinstance(entry, str):
            found.append(entry)
        elif isinstance(entry, dict):
            found += navigated(list(entry.values()))
        else:
            found += navigated(entry)
    return found


def test_every_public_name_is_in_the_table_of_the_api() -> None:
    listed = {name for row in rows(page("api/dray.md")) for name in re.findall(r"`(\w+)`", row[0])}
    assert set(dray.__all__) - listed == set()
