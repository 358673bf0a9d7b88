"""What rollout and policy replicas have in common: how they start, stay in touch with the job, and end."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dray.control import JobKeys, OldEpochError, RedisAddress, RedisConnection, RedisUnavailableError
from dray.errors import ControlPlaneError
from dray.runtime import messages
from dray.runtime.contract import PolicyGroup, ReplicaContext
from dray.runtime.controller_client import HURRIED, ControllerClient, ControllerLostError
from dray.runtime.exit_codes import ExitCode
from dray.runtime.group_channel import GroupLostError
from dray.runtime.heartbeat import Activity, Heartbeat
from dray.runtime.job import JobSpec
from dray.runtime.membership import MembershipError, Role
from dray.runtime.place import own_address
from dray.runtime.process import StopFlag, begin_process, finish_process, set_log_level, stop_on_signals
from dray.runtime.shutdown_step import ShutdownStep, closed_by_step, shutdown_step

_LOG = logging.getLogger("dray.runtime.replica")
UNREGISTER_BOUND = 2.0
_ANSWER_SHARE = 0.3
"""Of `timeouts.shutdown`: what a command may wait for a Redis that is stopped."""


class UserCodeError(Exception):
    """The user's class raised; the cause is its exception."""


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Tell exceptions of the user's class from dray's own; leaving the interpreter is one of them."""
    try:
        yield
    except GroupLostError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(what) from error


class Replica:
    """A replica's place in the job. As a context manager it registers, and unregisters last.

    Attributes:
        stop: set when the replica must end; every wait looks at it.
        activity: what the replica does, for the status page.
        published: prompts whose trajectories were handed on and that the controller was not told of yet.
    """

    def __init__(self, spec: JobSpec, role: Role, index: int, stop: StopFlag) -> None:
        self.spec = spec
        self.role = role
        self.index = index
        self.name = f"{role.value}-{index}"
        self.incarnation = secrets.token_hex(8)
        self.stop = stop
        self.activity = Activity()
        self.leaving_reason = ""
        self.published: list[int] = []
        self._resources = ExitStack()

    def __enter__(self) -> Replica:
        config = self.spec.config
        with self._resources as starting:
            self.client = starting.enter_context(
                ControllerClient.of_address_file(
                    self.spec.folder.controller_address, self.spec.token, config.timeouts.http
                )
            )
            self.stop.on_set(self.client.hurry)
            body = messages.Register(name=self.name, incarnation=self.incarnation, role=self.role, pid=os.getpid())
            # The controller itself may be starting: it has the same time for that as everybody.
            self.client.post("/register", body, messages.Directive, config.timeouts.start)
            starting.callback(self._unregister)
            heartbeat = Heartbeat(
                self.client,
                self.name,
                self.incarnation,
                self.activity,
                self.stop,
                interval=config.controller.heartbeat_interval,
                lost_after=config.timeouts.controller_lost,
                grace=config.timeouts.shutdown,
            )
            last_beat = ShutdownStep("send the last heartbeat", "the controller", HURRIED)
            self.heartbeat = closed_by_step(starting, heartbeat, last_beat)
            self.redis = starting.enter_context(
                RedisConnection(
                    RedisAddress(self.spec.redis_url),
                    shutdown=self.stop.event,
                    answer_timeout=min(3.0, config.timeouts.shutdown * _ANSWER_SHARE),
                    patience=config.timeouts.redis,
                )
            )
            self.keys = JobKeys(self.spec.job_id)
            self._resources = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def context(self, args: dict[str, object], group: PolicyGroup | None = None) -> ReplicaContext:
        """What the user's class is given at `setup`; every rollout replica has another seed."""
        offset = 0 if self.role is Role.POLICY else 1 + self.index
        return ReplicaContext(
            args=args,
            seed=(self.spec.config.job.seed * 10_007 + offset) % 2**31,
            index=self.index,
            name=self.name,
            output=self.spec.folder.root,
            group=group or PolicyGroup(),
            address=own_address(),
        )

    def _unregister(self) -> None:
        if self.stop.exit_code in (ExitCode.CONTROLLER_LOST, ExitCode.NOT_A_MEMBER):
            return
        body = messages.Unregister(
            name=self.name,
            incarnation=self.incarnation,
            reason=(self.leaving_reason or self.stop.reason or "done")[:2000],
            published=self.published,
        )
        try:
            with shutdown_step("unregister", "the controller", UNREGISTER_BOUND):
                self.client.post("/unregister", body, messages.Directive, timeout=UNREGISTER_BOUND)
        except ControlPlaneError as error:
            _LOG.warning("could not unregister: %s", error)


def run_replica(role: Role, work: Callable[[Replica], ExitCode]) -> int:
    """The main function of a replica's process: ``SPEC INDEX …`` on the command line, `work` in between."""
    index = int(sys.argv[2])
    begin_process(f"{role.value}-{index}")
    spec = JobSpec.read(Path(sys.argv[1]))
    set_log_level(spec.config.job.log_level)
    stop = StopFlag()

    def on_signal(number: signal.Signals) -> None:
        if stop.disposable:  # perhaps in the middle of a long import, which looks at nothing
            os._exit(128 + number)
        stop.set(f"received {number.name}", ExitCode(128 + number))

    stop_on_signals(on_signal)
    try:
        with Replica(spec, role, index, stop) as replica:
            try:
                code = work(replica)
            except UserCodeError as error:
                replica.leaving_reason = f"{error} raised {type(error.__cause__).__name__}"
                raise
            except ControlPlaneError as error:
                replica.leaving_reason = str(error)
                raise
    except UserCodeError as error:
        _LOG.error("%s raised", error, exc_info=error.__cause__)
        return _code_of(error.__cause__)
    except MembershipError as error:
        _LOG.error("%s", error)
        return stop_code(stop, ExitCode.NOT_A_MEMBER)
    except ControllerLostError as error:
        _LOG.error("%s", error)
        return stop_code(stop, ExitCode.CONTROLLER_LOST)
    except RedisUnavailableError as error:
        _LOG.error("%s", error)
        return stop_code(stop, ExitCode.REDIS_LOST)
    except OldEpochError as error:
        _LOG.error("%s", error)
        return ExitCode.OLD_EPOCH
    except GroupLostError as error:
        _LOG.error("%s", error)
        return stop_code(stop, ExitCode.GROUP_LOST)
    finally:
        finish_process()
    _LOG.info("ends with exit code %d (%s)", code, code.name)
    return code


def _code_of(raised: BaseException | None) -> int:
    """The exit code for what the user's class has raised: one that it has chosen with `sys.exit` is its own.

    0 would say that the replica is done; what does not fit into an exit code, such as a text, has no number.
    """
    if isinstance(raised, SystemExit) and isinstance(raised.code, int) and 0 < raised.code < 256:
        return raised.code
    return ExitCode.USER_CODE


def stop_code(stop: StopFlag, otherwise: ExitCode) -> ExitCode:
    """The exit code that came with the request to stop, if there was one."""
    return ExitCode(stop.exit_code) if stop.exit_code is not None else otherwise
