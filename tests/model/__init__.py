"""An exhaustive model of direct leases. Nothing in dray imports this package, and it imports nothing of dray.

`python -m model` visits every reachable state of a table of small scenarios (`model.scenarios`) and checks the
properties in `model.properties`; then it plants one defect of the protocol at a time (`model.defects`), and each must
violate a property. docs/testing.md explains how to read the output.

What is modelled:

- Total store order, the memory order of x86: a FIFO store buffer for each processor, loads that pass earlier stores,
  and a barrier that empties the buffers of the consumers' processors one after the other, in any order. Each thread has
  a processor of its own, and each step has at most one shared access (`model.machine`).
- The consumer's lease and end, with the token, the index of the lease word, the board and the doorbell
  (`model.consumer`); a lease over the socket, a network lane's included (`model.server`).
- The owner's claim, commit, observe, retire, drop, wait and close, by one thread or two, with a ring's lock that is not
  held during a barrier, and with a barrier that fails (`model.owner`).
- Attaching, processes that are killed between any two steps, and sockets that are closed under a lease. Stores that a
  killed process has executed still leave its buffer; its pidfd fires after them.
- Waiting without the repeated check every 100 ms: a wake-up that is lost is a violation, not a delay.

What is not modelled:

- Other memory orders (aarch64), compilers that reorder, and words that are not read and written whole.
- The interpreter: free-threaded Python, signal handlers and exceptions within a step, finalisers, `fork`, `exec` with
  leases. What the protocol does against them is modelled where it is a step: the token, and two threads that end one
  lease.
- Checks of a reference's size and slot number, memory that is not dray's, and words with garbage in them.
- Connections: a request is answered or its process is killed. Deadlines, retries, and a lease over a socket that is
  closed while its process is alive are the simulation's.
- The heir of an owner that was killed, credits of streams, statistics, and the time that anything takes.
- More slots, threads, payloads and faults than the scenarios have.
"""
