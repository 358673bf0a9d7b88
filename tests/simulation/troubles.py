"""Faults that have a time of their own: what stops, dies, restarts, and how the clock jumps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simulation.clients import SimulatedConsumer
from simulation.faults import Fault
from simulation.scheduler import Actor, Interrupted
from simulation.serving import SimulatedServer

if TYPE_CHECKING:
    from simulation.world import Run

_PAUSES = (0.001, 0.01, 0.1, 1.0, 10.0, 40.0)
_STOPS = (0.05, 1.0, 20.0, 70.0, 130.0)


class Troubles:
    """Brings about the timed faults of a run's plan."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._scheduler = run.scheduler
        self._rng = run.rng
        self._stopped: list[Actor] = []
        self._deaf: dict[bytes, list[float]] = {}
        self._ending = False

    def start(self) -> None:
        """Begin, if there is anything to bring about."""
        if self._run.plan.timed:
            process = self._scheduler.process("troubles")
            self._scheduler.spawn(process, "", self._bring, idles=True)

    def end(self) -> None:
        """Begin nothing more, and resume everything that is stopped."""
        self._ending = True
        for actor in self._stopped:
            self._scheduler.resume(actor)
        self._stopped.clear()

    @property
    def restarting(self) -> bool:
        """A server is down, and about to listen again."""
        return any(len(times) % 2 for times in self._deaf.values())

    def listened(self, producer: bytes, since: float) -> bool:
        """The server of a producer has not been down since then."""
        times = self._deaf.get(producer, [])
        return not times or (len(times) % 2 == 0 and times[-1] < since)

    def watch(self, server: SimulatedServer) -> None:
        """Let faults come between the steps of a server."""

        def at_step() -> None:
            fault = self._run.plan.strike_at_step()
            if server.closing or self.restarting or self._ending:
                return
            if fault is Fault.SERVER_KILLED:
                self._strike_here(fault, lambda: self._kill_server(server))
            elif fault is Fault.SERVER_STOPPED:
                self._strike_here(fault, lambda: self._stop(server.process.actors))

        server.at_step = at_step

    def watch_client(self, consumer: SimulatedConsumer) -> None:
        """Let faults come between the steps of a client."""

        def at_step() -> None:
            fault, actor = self._run.plan.strike_at_step(), self._scheduler.actor
            if consumer.closed or self._ending:
                return
            if fault is Fault.CLIENT_KILLED:
                self._strike_here(fault, lambda: self._kill_client(consumer))
            elif fault is Fault.CLIENT_STOPPED:
                self._strike_here(fault, lambda: self._stop(consumer.process.actors))
            elif fault is Fault.INTERRUPT and actor is not None and consumer.may_interrupt(actor):
                self._run.plan.count(fault.value)
                self._scheduler.note(f"{actor.name} is interrupted at a step")
                raise Interrupted

        consumer.process.at_step = at_step

    # --- inside -----------------------------------------------------------------------------------------------

    def _strike_here(self, fault: Fault, strike: Callable[[], bool]) -> None:
        """A fault comes before the running actor continues."""
        done: list[bool] = []

        def event() -> None:
            if not self._ending and strike():
                self._run.plan.count(fault.value)
            done.append(True)

        self._scheduler.at(self._scheduler.now(), event)
        while not done:
            self._scheduler.pause()

    def _bring(self) -> None:
        scheduler, rng, plan = self._scheduler, self._rng, self._run.plan
        for _ in range(rng.randint(2, 8)):
            scheduler.sleep(rng.choice(_PAUSES))
            if self._ending:
                return
            fault = rng.choice(plan.timed)
            if self._strike(fault):
                plan.count(fault.value)

    def _strike(self, fault: Fault) -> bool:
        """Bring one fault about; False if there is nothing that it can strike."""
        scheduler, rng, run = self._scheduler, self._rng, self._run
        if fault is Fault.CLOCK_JUMP:
            seconds = rng.choice((0.5, 5.0, 31.0, 101.0, 300.0))
            scheduler.note(f"the clock jumps {seconds} s")
            scheduler.clock.advance(seconds)
            return True
        if fault is Fault.RESET:
            return run.kernel.reset_one(rng)
        servers = [server for server in run.servers if not server.process.dead and not server.closing]
        clients = [consumer for consumer in run.consumers if not consumer.process.dead and not consumer.closed]
        on_server: dict[Fault, Callable[[SimulatedServer], bool]] = {
            Fault.LOOP_WEDGED: self._wedge,
            Fault.SERVER_STOPPED: lambda server: self._stop(server.process.actors),
            Fault.SERVER_RESTARTED: self._restart,
            Fault.SERVER_REPLACED: self._replace,
            Fault.SERVER_KILLED: self._kill_server,
            Fault.SERVER_CLOSED: self._close_server,
        }
        on_client: dict[Fault, Callable[[SimulatedConsumer], bool]] = {
            Fault.CLIENT_STOPPED: lambda consumer: self._stop(consumer.process.actors),
            Fault.CLIENT_KILLED: self._kill_client,
            Fault.CLIENT_CLOSED: self._close_client,
            Fault.INTERRUPT: self._interrupt,
            Fault.CLIENT_FORKED: self._fork,
        }
        if fault in on_server:
            if fault is Fault.SERVER_REPLACED:
                servers = [server for server in run.servers if server.process.dead or not server.closing]
            return bool(servers) and on_server[fault](rng.choice(servers))
        return bool(clients) and on_client[fault](rng.choice(clients))

    def _wedge(self, server: SimulatedServer) -> bool:
        actor = self._rng.choice(server.loops).actor
        return not actor.locks and self._stop([actor])  # a thread that holds a lock runs

    def _stop(self, actors: list[Actor]) -> bool:
        running = [actor for actor in actors if actor.alive and not actor.stopped]
        if not running:
            return False
        seconds = self._rng.choice(_STOPS)
        self._scheduler.note(f"{', '.join(actor.name for actor in running)} stopped for {seconds} s")
        for actor in running:
            self._scheduler.stop(actor)
            self._stopped.append(actor)

        def resume() -> None:
            for actor in running:
                if actor in self._stopped:
                    self._stopped.remove(actor)
                    self._scheduler.resume(actor)

        self._scheduler.at(self._scheduler.now() + seconds, resume)
        return True

    def _restart(self, server: SimulatedServer) -> bool:
        if any(loop.actor.stopped or loop.actor.greenlet.dead for loop in server.loops):
            return False
        self._scheduler.note(f"{server.name} restarts its threads")
        times = self._deaf.setdefault(server.ring.producer_id, [])
        times.append(self._scheduler.now())
        server.restart()
        times.append(self._scheduler.now())
        return True

    def _replace(self, server: SimulatedServer) -> bool:
        self._scheduler.note(f"another producer in place of {server.name}")
        self._forget(server)
        server.replace()
        self._run.start_writer(server)
        return True

    def _kill_server(self, server: SimulatedServer) -> bool:
        self._scheduler.note(f"{server.name} is killed")
        self._forget(server)
        server.kill()
        return True

    def _close_server(self, server: SimulatedServer) -> bool:
        if any(loop.actor.stopped or loop.actor.greenlet.dead for loop in server.loops):
            return False
        self._scheduler.note(f"{server.name} closes its ring")
        server.begin_close()
        self._scheduler.spawn(server.process, "close", server.close, idles=True)
        return True

    def _forget(self, server: SimulatedServer) -> None:
        self._stopped = [actor for actor in self._stopped if actor.process is not server.process]

    def _kill_client(self, consumer: SimulatedConsumer) -> bool:
        self._scheduler.note(f"{consumer.process.name} is killed")
        consumer.killed()
        self._scheduler.kill(consumer.process)
        return True

    def _close_client(self, consumer: SimulatedConsumer) -> bool:
        self._scheduler.note(f"{consumer.process.name} closes its client")
        self._scheduler.spawn(consumer.process, "close", consumer.close)
        return True

    def _fork(self, consumer: SimulatedConsumer) -> bool:
        attachments = consumer.attachments
        self._scheduler.note(f"{consumer.process.name} forks, with {len(attachments)} attachments")
        for attachment in attachments:
            attachment.end_in_child()
        return bool(attachments)

    def _interrupt(self, consumer: SimulatedConsumer) -> bool:
        waiting = [actor for actor in consumer.process.actors if consumer.may_interrupt(actor)]
        if not waiting:
            return False
        actor = self._rng.choice(waiting)
        self._scheduler.note(f"{actor.name} is interrupted")
        return self._scheduler.interrupt(actor)
