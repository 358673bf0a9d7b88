import time

from dray.runtime.heartbeat import Activity


def test_wait_goes_on_while_it_is_the_same_and_begins_anew_otherwise() -> None:
    activity = Activity()
    activity.waits("8 of 8 payloads", "the rollout replicas")
    time.sleep(0.03)
    activity.waits("8 of 8 payloads", "the rollout replicas")
    report = activity.report()
    assert (report.doing, report.waits_for) == ("waiting for 8 of 8 payloads", "the rollout replicas")
    assert report.seconds >= 0.03
    activity.waits("5 of 8 payloads", "the rollout replicas")
    assert activity.report().seconds < report.seconds
    activity.doing("generating")
    assert (activity.report().doing, activity.report().waits_for) == ("generating", "")


def test_ages_are_asked_for_when_reported() -> None:
    activity, ages = Activity(), {"payload": 1.0, "lease": None}
    assert activity.report().ages == {}
    activity.show_ages(lambda: ages)  # type: ignore[arg-type,return-value]
    assert activity.report().ages == {"payload": 1.0}
    ages["payload"] = 2.0
    assert activity.report().ages == {"payload": 2.0}
