"""`AbortableReads`: reads from stores of other processes, each of which can be aborted, whatever it waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from dray.clock import Deadline
from dray.errors import BufferClosedError, ConnectionReset
from dray.integrations.store import PayloadStore
from dray.resources import Closing

T = TypeVar("T")


class AbortableReads(Closing, Generic[T]):
    """Reads with one store, in several threads. An abort closes the store, which ends what waits in it.

    The reads that are not aborted are repeated with another store.

    Args:
        make_store: makes a store, with which nothing is put.
        threads: reads at a time that `AbortableRead.start` has begun.

    Attributes:
        done: reads that have returned a value.
        aborted: reads that were aborted.
    """

    def __init__(self, make_store: Callable[[], PayloadStore], *, threads: int = 4) -> None:
        self.done = self.aborted = 0
        self.make_store = make_store
        self._threads = threads
        self._lock = threading.Lock()
        self._store: PayloadStore | None = None
        self._open: set[AbortableRead[T]] = set()
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False

    def read(self, key: str, use: Callable[[PayloadStore, float], T], timeout: float) -> AbortableRead[T]:
        """A read, which has not begun.

        Args:
            key: by which `abort` knows it.
            use: reads from a store within so many seconds; it may be called several times.
            timeout: seconds for the read, from its beginning on.
        """
        read = AbortableRead(self, key, use, timeout)
        with self._lock:
            self._open.add(read)
        return read

    def abort(self, key: str, only: AbortableRead[T] | None = None) -> None:
        """Abort all reads of a key, or only one of them. What has ended is not an error."""
        with self._lock:
            aborted = [each for each in self._open if each.key == key and only in (None, each)]
            for each in aborted:
                each.aborted = True
                self._open.discard(each)
            self.aborted += len(aborted)
            store, self._store = (self._store, None) if aborted else (None, self._store)
        if store is not None:
            store.close()

    def close(self) -> None:
        """End all reads with `BufferClosedError`. Twice is fine."""
        with self._lock:
            self._closed = True
            store, executor = self._store, self._executor
            self._store = self._executor = None
        if store is not None:
            store.close()
        if executor is not None:
            executor.shutdown()

    # --- for reads --------------------------------------------------------------------------------------------

    def executor(self) -> ThreadPoolExecutor:
        """The threads of reads that are started."""
        with self._lock:
            if self._executor is None:
                self._check_open()
                self._executor = ThreadPoolExecutor(self._threads, "dray-read")
            return self._executor

    def store_for(self, read: AbortableRead[T]) -> PayloadStore:
        """The store to read with.

        Raises:
            ConnectionReset: the read is aborted.
            BufferClosedError: this object is closed.
        """
        with self._lock:
            if read.aborted:
                raise ConnectionReset(f"the read of {read.key} was aborted")
            self._check_open()
            if self._store is None:
                self._store = self.make_store()
            return self._store

    def is_replaced(self, store: PayloadStore) -> bool:
        """An abort has closed this store."""
        return store is not self._store

    def end(self, read: AbortableRead[T], *, done: bool) -> None:
        """The read has returned or raised."""
        with self._lock:
            self._open.discard(read)
            self.done += done

    def _check_open(self) -> None:
        if self._closed:
            raise BufferClosedError("the reads are closed")


class AbortableRead(Generic[T]):
    """One read.

    Attributes:
        key: what is read.
        aborted: whether it was aborted before it had ended.
    """

    def __init__(
        self, reads: AbortableReads[T], key: str, use: Callable[[PayloadStore, float], T], timeout: float
    ) -> None:
        self.key = key
        self.aborted = False
        self._reads = reads
        self._use = use
        self._timeout = timeout

    def run(self) -> T:
        """Read, in this thread.

        Raises:
            ConnectionReset: it was aborted.
        """
        deadline = Deadline.after(self._timeout)
        done = False
        try:
            while True:
                store = self._reads.store_for(self)
                try:
                    value = self._use(store, max(0.0, deadline.remaining))
                    done = True
                    return value
                except BufferClosedError:
                    if not self._reads.is_replaced(store):
                        raise
        finally:
            self._reads.end(self, done=done)

    def start(self) -> Future[T]:
        """Read in another thread."""
        return self._reads.executor().submit(self.run)

    def abort(self) -> None:
        """End it with `ConnectionReset`, if it has not ended."""
        self._reads.abort(self.key, self)
