import pytest

from dray.errors import ControlPlaneError
from dray.jobs.launch.supervisor import Reports
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerLostError
from dray.jobs.messages.models import Phase, Role


class Answering:
    """Keeps what it is sent, and raises the errors that it is given first."""

    def __init__(self, *errors: ControlPlaneError) -> None:
        self.errors = list(errors)
        self.sent: list[str] = []

    def post(self, path: str, body: models.Message, reply: type[models.Directive]) -> models.Directive:
        if self.errors:
            raise self.errors.pop(0)
        self.sent.append(f"{path} {getattr(body, 'name', '')} {getattr(body, 'reason', '')}".strip())
        return reply(phase=Phase.RUNNING, stop=len(self.sent) > 1)


def died(name: str, reason: str) -> models.Died:
    return models.Died(name=name, role=Role.ROLLOUT, pid=7, reason=reason)


def test_what_the_supervisor_saw_waits_until_the_controller_answers_and_is_sent_in_order() -> None:
    controller = Answering(ControllerLostError("silent"), ControllerLostError("silent"))
    reports = Reports(controller)
    for name in ("rollout-1", "rollout-0"):
        reports.add(died(name, "killed"))
        with pytest.raises(ControllerLostError):
            reports.send()
    reports.add(models.Stop(reason="SIGINT"))
    answer = reports.send()
    assert answer is not None
    assert answer.stop
    assert controller.sent == ["/died rollout-1 killed", "/died rollout-0 killed", "/stop  SIGINT"]
    assert reports.send() is None


def test_newest_report_about_a_replica_takes_the_place_of_the_one_before() -> None:
    controller = Answering()
    reports = Reports(controller)
    for number in range(1000):
        reports.add(died("policy-0", f"attempt {number}"))
    reports.send()
    assert controller.sent == ["/died policy-0 attempt 999"]


def test_report_that_is_refused_is_not_sent_again() -> None:
    controller = Answering(ControlPlaneError("refused"))
    reports = Reports(controller)
    reports.add(died("rollout-0", "killed"))
    reports.add(died("rollout-1", "killed"))
    with pytest.raises(ControlPlaneError, match="refused"):
        reports.send()
    reports.send()
    assert controller.sent == ["/died rollout-1 killed"]
