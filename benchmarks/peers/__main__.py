"""The consumer's process of a peer: ``python -m benchmarks.peers KIND``."""

from __future__ import annotations

import sys

from benchmarks.peers.kinds import make_service
from benchmarks.service import serve

if __name__ == "__main__":
    serve(make_service(sys.argv[1]))
