"""A soak of `dray.streams`: producers and consumers that are killed, stopped, ended and started at random.

Each process writes a journal of what it has put, got and acknowledged. The checker decides from the journals, from
the times at which the supervisor has killed and stopped processes, and from what is left behind. The storm comes
in rounds of some seconds, each with its own number of producers and consumers. A steady producer and a steady
consumer live through all of them, and must hold at the end what they held before.
"""
