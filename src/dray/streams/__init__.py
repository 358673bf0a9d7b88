"""Streams: payloads from any number of producers to any number of consumers, without a broker.

```python
with dray.Producer("cartpole") as producer:                 # rollout.py
    producer.put(observations=observations, rewards=rewards)

with dray.Consumer("cartpole") as consumer:                 # train.py
    for payload in consumer:
        train(payload["observations"])
```

Producers and consumers of one name on one host find each other. Between hosts, a producer listens at an address,
and consumers name it. What is promised, and what is not, stands in docs/reference/streams.md.
"""

from dray.identifiers import PayloadId
from dray.streams.consumer import Consumer, ConsumerStatistics
from dray.streams.payload import Payload, Weights
from dray.streams.producer import DeadLetter, GroupStatistics, Producer
from dray.streams.weights import Publisher, Subscriber

__all__ = [
    "Consumer",
    "ConsumerStatistics",
    "DeadLetter",
    "GroupStatistics",
    "Payload",
    "PayloadId",
    "Producer",
    "Publisher",
    "Subscriber",
    "Weights",
]
