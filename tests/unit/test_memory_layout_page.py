"""docs/memory-layout.md says where everything lies in a segment, as `dray.ring.layout` has it."""

import re
import struct
from pathlib import Path

from dray.ring import SlotState, layout

PAGE = (Path(__file__).parents[2] / "docs" / "memory-layout.md").read_text(encoding="utf-8")
KINDS = {"B": "u8", "I": "u32", "Q": "u64", "d": "f64"}


def rows(section: str, of: int = 0) -> list[list[str]]:
    """The cells of the n-th table of a section, without its header."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[of]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def fields(code: struct.Struct) -> list[tuple[int, str]]:
    """(offset, type) of each field of a struct."""
    found, at = [], 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", code.format):
        if kind in "sx":
            found.append((at, f"{count}s"))
            at += int(count)
            continue
        for _ in range(int(count or 1)):
            found.append((at, KINDS[kind]))
            at += struct.calcsize(f"<{kind}")
    assert at == code.size
    return found


def test_offsets_of_both_headers_are_those_of_the_structs() -> None:
    for section, code in (("Segment header", layout.SEGMENT_HEADER), ("Slot header", layout.SLOT_HEADER)):
        assert [(int(row[0]), row[2]) for row in rows(section)] == fields(code)
        assert f"{code.size} bytes" in PAGE.split(f"\n## {section}\n")[1].splitlines()[1]


def test_fields_of_a_slot_header_lie_at_the_offsets_of_the_code() -> None:
    at = {row[1]: int(row[0]) for row in rows("Slot header")}
    for name in ("state", "flags", "sequence", "nbytes", "checksum", "commit_time", "consumed_by"):
        assert at[name] == getattr(layout, f"{name.upper()}_OFFSET")


def test_fields_of_the_segment_header_hold_what_the_page_says() -> None:
    made = layout.SegmentLayout(slots=5, slot_bytes=10_000)
    header = made.pack_segment_header(bytes(range(16)))
    expected = {
        "magic": layout.MAGIC, "version": layout.VERSION, "record_bytes": layout.SLOT_HEADER.size, "slots": 5,
        "slot_bytes": 10_000, "stride": made.stride, "slots_offset": made.slots_offset,
        "producer_id": bytes(range(16)),
    }  # fmt: skip
    for offset, name, kind, about in rows("Segment header"):
        size = {"u32": 4, "u64": 8}.get(kind) or int(kind[:-1])
        raw = header[int(offset) : int(offset) + size]
        found = raw if kind.endswith("s") else int.from_bytes(raw, "little")
        assert found == expected.pop(name), name
        constant = re.match(r"(\d+)(?=$|:)", about)
        if constant:
            assert int(constant[1]) == found, name
    assert expected == {}


def test_magic_version_and_bounds_are_those_of_the_code() -> None:
    assert f"`{layout.MAGIC.decode()}`" in PAGE
    assert f"Layout version {layout.VERSION}." in PAGE
    bounds = [int(number) for number in re.findall(r"1 … (\d+)", PAGE)]
    assert bounds == [layout.MAX_SLOTS, layout.MAX_SLOT_BYTES]


def test_states_have_the_numbers_of_the_code() -> None:
    (about,) = [row[3] for row in rows("Slot header") if row[1] == "state"]
    assert about == ", ".join(f"{state.value} {state.name}" for state in SlotState)


def test_worked_sizes_are_those_of_the_code() -> None:
    sizes = rows("Segment header", of=2)
    assert len(sizes) >= 3
    for row in sizes:
        slots, slot_bytes, *expected = map(int, row)
        made = layout.SegmentLayout(slots, slot_bytes)
        assert [made.slots_offset, made.stride, made.slot_offset(slots - 1), made.nbytes] == expected


def test_formulas_give_the_offsets_of_the_code() -> None:
    def align(value: int, unit: int) -> int:
        return -(-value // unit) * unit

    formulas = dict(rows("Segment header", of=1))
    for slots, slot_bytes in ((1, 1), (3, 100), (63, 4095), (64, 4096), (65, 4097), (1000, 1 << 20)):
        made = layout.SegmentLayout(slots, slot_bytes)
        names = {"align": align, "slots": slots, "slot_bytes": slot_bytes, "stride": made.stride, "s": slots - 1}
        names["slots_offset"] = made.slots_offset

        def value(text: str, names: dict[str, object] = names) -> object:
            return eval(re.sub(r"[`*]", "", text).replace("·", "*"), {}, names)

        assert value(formulas["offset of the header of slot *s*"]) == made.header_offset(slots - 1)
        assert value(formulas["slots_offset"]) == made.slots_offset
        pages, lines = re.findall(r"`(align[^`]+)`", formulas["stride"])
        assert value(pages if slot_bytes >= 4096 else lines) == made.stride
        assert value(formulas["offset of slot *s*"]) == made.slot_offset(slots - 1)
        assert value(formulas["size of the segment"]) == made.nbytes
