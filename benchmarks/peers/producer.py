"""The producer's process: ``python -m benchmarks.peers.producer KIND CONTROL REFERENCES``, two descriptors."""

from __future__ import annotations

import socket
import sys
from functools import partial

from benchmarks.peers.contract import produce
from benchmarks.peers.kinds import make_sender

if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as control, socket.socket(fileno=int(sys.argv[3])) as references:
        produce(partial(make_sender, sys.argv[1], references), control)
