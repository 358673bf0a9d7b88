"""How long an update of the weights of two workers takes, with dray and with two backends of TorchRL.

python tests/integrations/torchrl/measure_weights.py [MIB ...]
"""

import statistics
import sys
import time
import warnings

warnings.simplefilter("ignore")

from policies import Pendulum, constant_policy  # noqa: E402

UPDATES = 15


def seconds(backend: str, mib: int) -> list[float]:
    """Of each update, until both workers have applied it."""
    import torch
    from torchrl.collectors import MultiSyncCollector
    from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

    import dray.integrations.torchrl  # noqa: F401

    policy = constant_policy()
    policy.module.register_parameter("large", torch.nn.Parameter(torch.randn(mib << 18)))
    scheme = WeightSyncScheme.from_backend(backend)
    collector = MultiSyncCollector(
        [Pendulum] * 2, policy, frames_per_batch=20, total_frames=-1, weight_sync_schemes={"policy": scheme}
    )
    found = []
    try:
        next(iter(collector))
        for step in range(UPDATES):
            with torch.no_grad():
                policy.module.value.fill_(step / UPDATES)
            began = time.perf_counter()
            collector.update_policy_weights_()
            found.append(time.perf_counter() - began)
    finally:
        collector.shutdown()
        scheme.shutdown()
    return found[3:]


def main() -> None:
    """Print a table."""
    print(f"{'backend':<10} {'MiB':>5} {'median ms':>10} {'least ms':>9}")
    for mib in [int(each) for each in sys.argv[1:]] or [1, 64]:
        for backend in ("dray", "process", "shared"):
            found = seconds(backend, mib)
            print(
                f"{backend:<10} {mib:>5} {statistics.median(found) * 1e3:>10.1f} {min(found) * 1e3:>9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
