"""The driver of a Ray cluster: runs the functions of `ray_scenarios` that it is asked for.

    python ray_driver.py REQUESTS ANSWERS

Both are descriptors. A request is a line of JSON, ``[name, arguments]``; an answer is one with ``{"value": …}`` or
``{"error": traceback}``. The driver ends when there are no more requests.
"""

import importlib
import json
import os
import sys
import traceback

import ray

from dray.integrations.ray import register_dray_transport

SETTINGS = "TRANSPORT_SETTINGS"
"""The variable with the arguments of `register_dray_transport`, as JSON."""
HOOK = "dray.integrations.ray.register_dray_transport"
LOGICAL_CPUS = 32
"""How many actors there may be at a time; fewer would wait without a limit, and without a message."""


def main() -> None:
    requests, answers = (int(each) for each in sys.argv[1:])
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        num_cpus=LOGICAL_CPUS,
        object_store_memory=512 << 20,
        log_to_driver=False,
        runtime_env=None if "NO_HOOK" in os.environ else {"worker_process_setup_hook": HOOK},
    )
    register_dray_transport(**json.loads(os.environ.get(SETTINGS, "{}")))
    try:
        scenarios = importlib.import_module("ray_scenarios")
        if "NO_HOOK" in os.environ:  # workers cannot import it; classes of a program are pickled, too
            ray.cloudpickle.register_pickle_by_value(scenarios)
        with os.fdopen(requests) as lines, os.fdopen(answers, "w") as output:
            print(json.dumps({"value": None}), file=output, flush=True)
            for line in lines:
                name, arguments = json.loads(line)
                try:
                    answer = {"value": getattr(scenarios, name)(**arguments)}
                except Exception:
                    answer = {"error": traceback.format_exc()}
                print(json.dumps(answer), file=output, flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
