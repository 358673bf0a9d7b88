"""docs/reference/memory-layout.md describes the layout of a segment and of the memory of direct leases."""

import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dray import SharedRingBuffer
from dray.identifiers import MAX_SLOT_BYTES
from dray.ring import SlotState, direct, layout
from dray.ring.consumer_events import Descriptor
from dray.ring.mapping import FIXED_SIZE, seals_of
from dray.ring.shared_words import WORD_BYTES

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "memory-layout.md").read_text(encoding="utf-8")
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


def test_fields_of_the_segment_header_hold_what_the_page_states() -> None:
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
    assert bounds == [layout.MAX_SLOTS, MAX_SLOT_BYTES]


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


# --- memory of direct leases --------------------------------------------------------------------------------


SLOTS, READERS, LEASES = 5, 3, 4


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer(SLOTS, 64, readers=READERS) as ring:
        yield ring


def attached(ring: SharedRingBuffer, reader: int = 1) -> direct.Attached:
    found = ring.attach(Descriptor(os.pidfd_open, os.getpid()), pid=os.getpid(), reader=reader, leases=LEASES)
    assert found is not None
    return found


def put(ring: SharedRingBuffer) -> tuple[int, int]:
    with ring.claim(8) as writer:
        writer.commit()
    return writer.slot, writer.sequence


def value(text: str, **names: int) -> int:
    """What a formula of the page gives: the first words of a cell, which may be superscripts."""
    text = re.sub(r"[`*]", "", text).replace("·", "*").replace("⁶³", "**63").replace("⁶²", "**62")
    return int(eval(text, {}, {"slots": SLOTS, "readers": READERS, "max_leases": LEASES, **names}))


def word_of(section: str, name: str) -> str:
    """Where a word is, as a formula."""
    text = PAGE.split(f"\n### {section}\n")[1].split("\n### ")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[1:2] == [name]:
            return cells[0].split(",")[0]
    raise AssertionError(f"{section} has no {name}")


def test_sizes_of_the_memory_of_direct_leases_are_those_of_the_code(ring: SharedRingBuffer) -> None:
    sizes = {row[0]: value(row[1]) for row in rows("Memory of direct leases")}
    page = attached(ring).page
    owner = ring.direct()
    made = {"control": owner.control, "board": owner.board, "lease page": page}
    assert sizes == {name: os.fstat(words.fileno()).st_size for name, words in made.items()}
    assert sizes == {name: WORD_BYTES * len(words.words) for name, words in made.items()}


def test_words_of_the_control_are_those_of_the_code(ring: SharedRingBuffer) -> None:
    owner = ring.direct()
    words = owner.control.words
    assert not any(words)
    owner.begin_wait()
    assert words[value(word_of("Control", "doorbell"))] != 0
    owner.end_wait()
    assert not any(words)
    slot, sequence = put(ring)
    table = rows("Memory of direct leases", of=2)
    committed, retiring, retired = (value(row[0], q=sequence) for row in table)
    assert words[value(word_of("Control", "generation"), s=slot)] == committed
    owner.suspect(slot, sequence)
    assert words[slot] == retiring
    owner.publish(slot, sequence)
    for reader in range(READERS):
        assert ring.consume(slot, sequence, reader)
    assert words[slot] == retired
    assert "`RETIRING`" in table[1][1]


def test_closing_the_ring_sets_the_closed_word(ring: SharedRingBuffer) -> None:
    owner = ring.direct()
    put(ring)
    words = owner.control.words
    kept = words[:]  # a view that outlives the owner's
    ring.close()
    expected = [0] * len(kept)
    expected[value(word_of("Control", "closed"))] = 1
    assert kept.tolist() == expected


def test_a_consumer_that_finds_no_generation_after_the_close_finds_the_closed_word(ring: SharedRingBuffer) -> None:
    class Recorded:
        """Words whose stores are recorded."""

        def __init__(self) -> None:
            self.stored: list[int] = []

        def __setitem__(self, word: int, value: int) -> None:
            self.stored.append(word)

    owner = ring.direct()
    words = owner.control.words
    recorded: Any = Recorded()
    owner.control.words = recorded
    owner.close()
    assert recorded.stored[0] == value(word_of("Control", "closed"))
    assert sorted(recorded.stored) == [*range(SLOTS), value(word_of("Control", "closed"))]
    assert not any(words)


def test_the_word_of_a_reader_on_the_board_is_where_the_page_places_it(ring: SharedRingBuffer) -> None:
    owner = ring.direct()
    for slot, sequence in [put(ring) for _ in range(SLOTS)]:
        for reader in range(READERS):
            place = value("s · readers + r", s=slot, r=reader)
            assert owner.board.words[place] == 0
            owner.board.words[place] = sequence + 1
            assert ring.inspect()[slot].consumed_by == (2 << reader) - 1
    assert "The word *s* · readers + *r* belongs to" in PAGE


def test_lease_words_and_the_end_word_are_where_the_page_places_them(ring: SharedRingBuffer) -> None:
    slot, _ = put(ring)
    page = attached(ring).page.words
    for word in range(LEASES):
        page[value(word_of("Lease page", "lease word"), w=word)] = slot + 1
    assert ring.inspect()[slot].leases == LEASES
    page[0] = SLOTS + 1
    assert ring.inspect()[slot].leases == LEASES - 1
    assert ring.statistics().ignored_words > 0
    page[value(word_of("Lease page", "end"))] = 1
    assert ring.statistics().attachments == 1
    for word in range(LEASES):
        page[word] = 0
    assert ring.statistics().attachments == 0


def test_seals_and_modes_are_those_of_the_page(ring: SharedRingBuffer) -> None:
    found = attached(ring)
    control, board, page, _, _ = ring.direct().descriptors(found)
    named = re.findall(r"`F_SEAL_(\w+)`", PAGE.split("### Seals and access")[1].split("\n- ")[1])
    assert sum({"SEAL": 1, "SHRINK": 2, "GROW": 4}[name] for name in named) == FIXED_SIZE
    for descriptor in (control, board, page):
        assert seals_of(descriptor) == FIXED_SIZE
    modes = [fcntl.fcntl(each, fcntl.F_GETFL) & os.O_ACCMODE for each in (control, board, page)]
    assert modes == [os.O_RDONLY, os.O_RDWR, os.O_RDWR]


def test_the_largest_sequence_number_is_that_of_the_code() -> None:
    (limit,) = re.findall(r"sequence number of (2⁶²) or more cannot be leased directly", PAGE)
    assert value(limit) == direct.MAX_SEQUENCE
