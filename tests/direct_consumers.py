"""Direct consumers of a ring in the process of a test: what a handshake does, without a server."""

import os

from dray.ring import SharedRingBuffer, membarrier
from dray.ring.attachment import Attachment
from dray.ring.consumer_events import Descriptor


def attach(ring: SharedRingBuffer, *, pid: int = 0, reader: int = 0, leases: int = 4) -> Attachment:
    """Attach this process to the ring, which takes it for process `pid`, by default for itself."""
    membarrier.register()
    pid = pid or os.getpid()
    attached = ring.attach(Descriptor(os.pidfd_open, pid), pid=pid, reader=reader, leases=leases)
    assert attached is not None, "the ring offers no direct leases"
    sent = [ring.segment.fileno(), *ring.direct().descriptors(attached)]
    return Attachment.open(
        [os.dup(each) for each in sent],
        slots=ring.slots,
        readers=ring.readers,
        leases=leases,
        reader=reader,
        newest=ring.retain == "newest",
    )
