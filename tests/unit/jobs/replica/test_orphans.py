from dray.jobs.replica.ring_transfer import OrphanWatch


def test_only_what_stays_unlisted_is_an_orphan() -> None:
    watch = OrphanWatch(patience=6)
    assert watch.orphans([1, 2], now=0) == []
    assert watch.orphans([1, 3], now=5) == []
    assert watch.orphans([1, 2, 3], now=6) == [1]
    assert watch.orphans([2, 3], now=11) == [3]
    assert len(watch) == 2
    assert watch.orphans([], now=20) == []
    assert len(watch) == 0
