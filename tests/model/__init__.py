"""An exhaustive model of direct leases. Nothing in dray imports this package, and it imports nothing of dray.

`python -m model` visits every reachable state of a table of small scenarios (`model.scenarios`) and checks the
properties in `model.properties`. Then it plants one defect of the protocol at a time (`model.defects`), and each
must violate a property. docs/reference/testing.md states what is modelled and what is not, and how to read
the output.

| module | content |
|---|---|
| `machine` | memory and processors: total store order, with a FIFO store buffer for each thread |
| `world` | the words and variables of a scenario, and the history that is checked |
| `consumer` | a consumer's thread: lease, read, end, and the end of its attachment |
| `owner_thread`, `observer`, `owner` | a thread of the owner: lock and barrier; observations; claim to close |
| `server` | leases over the socket, attachments, and faults of processes and servers |
| `planted_consumer`, `planted_observer`, `planted_owner`, `planted_server` | the same with a defect |
| `search` | the search over all interleavings |
| `stream` | the words that a producer and the consumers of its stream share |
| `stream_search` | the scenarios of streams, and their planted defects |
"""
