import copy
from pathlib import Path

import pytest
from pydantic import ValidationError

from dray.errors import ConfigError, error_lines
from dray.jobs import config
from dray.jobs.config import JobConfig
from dray.jobs.job_file import MAX_MISTAKES, draft_job, load_job

SMALLEST = """
[job]
name = "small"
max_steps = 3

[rollout]
worker = "job.py:Worker"
slots = 8

[policy]
trainer = "job.py:Trainer"
batch_size = 4
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(SMALLEST)
    return path


def error_of(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def test_smallest_job_file_gets_every_default(job_file: Path) -> None:
    config = load_job(job_file)
    assert (config.job.transfer, config.job.lane, config.rollout.replicas) == ("reference", "auto", 2)
    assert config.work_items_in_flight == 8
    assert config.stop is None


def test_override_takes_toml_values_and_bare_words(job_file: Path) -> None:
    config = load_job(
        job_file, ["job.lane=tcp", "job.seed=7", "rollout.args.depth=[1, 2]", "redis.url=redis://h:1"]
    )
    assert (config.job.lane, config.job.seed, config.redis.url) == ("tcp", 7, "redis://h:1")
    assert config.rollout.args == {"depth": [1, 2]}


def test_rings_hold_what_waits_for_a_checkpoint(job_file: Path) -> None:
    waiting = ["policy.ack=checkpoint", "policy.checkpoint_every=2"]
    assert load_job(job_file, waiting).payloads_held == 8
    assert error_of(job_file, "policy.ack=checkpoint", "policy.checkpoint_every=17").allowed.endswith(
        "which is 68"
    )
    inline = ["policy.ack=checkpoint", "policy.checkpoint_every=3", "job.transfer=inline"]
    assert error_of(job_file, *inline).key == "rollout.work_items_in_flight"
    assert load_job(job_file, [*inline, "rollout.work_items_in_flight=12"]).work_items_in_flight == 12


def test_policy_groups_need_references(job_file: Path) -> None:
    error = error_of(job_file, "policy.replicas=2", "job.transfer=inline")
    assert (error.key, error.value) == ("policy.replicas", 2)


def test_admission_lets_as_many_batches_be_under_way_as_versions_may_pass(job_file: Path) -> None:
    in_flight = ["rollout.work_items_in_flight=100"]
    assert load_job(job_file, in_flight).work_items_in_flight == 100
    assert load_job(job_file, [*in_flight, "policy.max_staleness=1"]).work_items_in_flight == 8
    assert load_job(job_file, ["policy.max_staleness=9"]).work_items_in_flight == 8
    dropping = load_job(job_file, [*in_flight, "policy.max_staleness=1", "policy.staleness=drop"])
    assert (dropping.work_items_in_flight, dropping.in_order) == (100, False)


def test_configuration_cannot_be_changed(job_file: Path) -> None:
    config = load_job(job_file)
    with pytest.raises(ValueError):
        config.job.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("job.sede=3", "job.sede", "did you mean seed?"),
        ("jobs.seed=3", "jobs", "did you mean job?"),
        ("job.seed=-1", "job.seed", "from 0 to 2147483647"),
        ("job.seed=true", "job.seed", "a whole number"),
        ("job.seed=1.0", "job.seed", "a whole number"),
        ("job.lane=rdma", "job.lane", '"auto" or one of shm, ucx, tcp'),
        ("job.name=a/b", "job.name", "letters, digits"),
        (
            "job.plot=../plot.png",
            "job.plot",
            "a file name of letters, digits, '.', '_' or '-' that ends in .png, or",
        ),
        ("job.transfer=nccl", "job.transfer", '"reference" or "inline"'),
        ("job.max_steps=0", "job.max_steps", "at least 1"),
        ("rollout.replicas=-2", "rollout.replicas", "at least 1"),
        ("rollout.worker=Worker", "rollout.worker", "file.py:Class"),
        ("rollout.args=3", "rollout.args", "a table"),
        ("rollout.slots=3", "rollout.slots", "at least policy.batch_size"),
        ("rollout.work_items_in_flight=3", "rollout.work_items_in_flight", "at least policy.batch_size"),
        ("policy.batch_size=many", "policy.batch_size", "a whole number"),
        ("policy.replicas=65", "policy.replicas", "at most 64"),
        ("policy.readers=2", "policy.readers", "must divide policy.replicas, which is 1"),
        ("policy.replicas=3", "policy.batch_size", "a multiple of policy.replicas / policy.readers, which is 3"),
        ("policy.ack=never", "policy.ack", '"step" or "checkpoint"'),
        ("policy.ack=checkpoint", "rollout.slots", "policy.checkpoint_every with policy.ack"),
        ("policy.max_staleness=-1", "policy.max_staleness", "at least 0"),
        ("redis.url=http://h", "redis.url", "redis://"),
        ("controller.port=70000", "controller.port", "a port number"),
        ("controller.dead_after=1", "controller.dead_after", "three times"),
        ("timeouts.read=inf", "timeouts.read", "a number of seconds"),
        ("timeouts.read=0", "timeouts.read", "a number of seconds"),
        ("stop.metric=loss", "stop.at_least", "must be a number"),
        ("slurm.nodes=3", "slurm.nodes", "unknown key"),
        ("slurm.time=01:60:00", "slurm.time", '"HH:MM:SS" or "D-HH:MM:SS"'),
        ("slurm.partition=--wrap=x", "slurm.partition", "the name of a partition"),
        ("slurm.policy_nodes=0", "slurm.policy_nodes", "at least 1"),
        ("slurm.interface=../lo", "slurm.interface", "a network interface that every node has"),
        ('slurm.sbatch_args=["gpu"]', "slurm.sbatch_args.0", 'each with a "-" first'),
        ('slurm.sbatch_args=["-a\\n-b"]', "slurm.sbatch_args.0", 'each with a "-" first'),
        ("slurm.environment={ LEVEL = 1 }", "slurm.environment.LEVEL", "a table of names, each with text"),
        ('slurm.environment={ "A B" = "1" }', 'slurm.environment."A B"', "a table of names, each with text"),
    ],
)
def test_wrong_value_is_named_with_its_key_and_what_is_allowed(
    job_file: Path, override: str, key: str, allowed: str
) -> None:
    error = error_of(job_file, override)
    assert error.key == key
    assert allowed in error.allowed


@pytest.mark.parametrize("override", ["lane", "job.lane", "lane=tcp", "job..lane=tcp", "job.name.first=a"])
def test_override_that_names_no_key_is_refused(job_file: Path, override: str) -> None:
    assert error_of(job_file, override).key == "--set"


def test_missing_key_and_missing_table_are_named(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(SMALLEST.replace("batch_size = 4", ""))
    error = error_of(path)
    assert (error.key, error.value) == ("policy.batch_size", None)
    assert str(error) == "policy.batch_size is missing: must be a whole number, at least 1 and at most 1048576"
    path.write_text(SMALLEST.replace("[job]", "[redis]").replace('name = "small"\nmax_steps = 3', ""))
    assert str(error_of(path)) == "[job] is missing: the table needs name, max_steps"


def test_all_mistakes_of_a_job_file_are_named_at_once(job_file: Path) -> None:
    mistakes = [
        "job.sede=3",
        "policy.batch_size=-1",
        "lane",
        "rollout.args.x=nan",
        "stop.metric=a",
        "policy.x=inf",
    ]
    with pytest.raises(ConfigError) as caught:
        load_job(job_file, mistakes)
    error = caught.value
    keys = ["--set", "rollout.args.x", "job.sede", "policy.batch_size", "policy.x", "stop.at_least"]
    assert sorted(each.key for each in error.mistakes) == sorted(keys)
    assert str(error).split("\n") == [each.message for each in error.mistakes]
    assert (error.key, error.value, error.allowed) == (
        "--set", "lane", "must be TABLE.KEY=VALUE, for example job.lane=tcp",
    )  # fmt: skip
    assert str(copy.copy(error)) == str(error)


def test_all_broken_rules_between_keys_are_named_at_once(job_file: Path) -> None:
    broken = ["rollout.slots=3", "rollout.work_items_in_flight=2", "policy.readers=2", "controller.dead_after=1"]
    with pytest.raises(ConfigError) as caught:
        load_job(job_file, broken)
    keys = ["rollout.slots", "rollout.work_items_in_flight", "policy.readers", "controller.dead_after"]
    assert [each.key for each in caught.value.mistakes] == keys


def test_number_of_mistakes_that_are_named_is_bounded(job_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(job_file, [f"job.key{number}=1" for number in range(1000)])
    assert len(caught.value.mistakes) == MAX_MISTAKES


def test_wrong_configuration_is_a_value_error(job_file: Path) -> None:
    with pytest.raises(ValueError, match="unknown key"):
        load_job(job_file, ["job.sede=3"])


def test_unreadable_file_and_broken_toml_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    assert str(error_of(path)) == f"job file {path} cannot be read: No such file or directory"
    path.write_text("[job]\nname = \n")
    assert "line 2" in error_of(path).allowed
    path.write_bytes(b"\xff\xfe")
    assert "UTF-8" in error_of(path).allowed


@pytest.mark.parametrize(
    ("line", "key", "allowed"),
    [
        ("x = " + "[" * 20_000, "job file", "nested too deeply"),
        ("x = " + "9" * 5000, "job file", "4300 digits"),
        ("x = 0x" + "f" * 5000, "policy.x", "64 bits"),
        ("batch_size = 0x" + "f" * 5000, "policy.batch_size", "64 bits"),
        ("args.x = -9223372036854775809", "policy.args.x", "64 bits"),
        ("args" + ".a" * 3000 + " = 1", "policy.args.a", "64 deep"),
        ("args.x = [1, {y = inf}]", "policy.args.x.1.y", "finite"),
        ("args.x = nan", "policy.args.x", "finite"),
        ("args.day = 1979-05-27", "policy.args.day", "as text"),
        ("args.at = [07:32:00]", "policy.args.at.0", "as text"),
        (f"args = '{'x' * 100_000}'", "policy.args", "a table"),
        (f"{'x' * 100_000} = 1", "policy.xxx", "unknown key"),
        ('"a\\nb" = 1', 'policy."a\\nb"', "unknown key"),
        ('"a.b" = 1', 'policy."a.b"', "unknown key"),
    ],
)
def test_value_that_cannot_reach_the_processes_of_a_job_is_refused_in_one_short_line(
    job_file: Path, line: str, key: str, allowed: str
) -> None:
    broken = job_file.read_text().replace("batch_size = 4", f"batch_size = 4\n{line}")
    job_file.write_text(broken.replace("batch_size = 4\n", "") if line.startswith("batch_size") else broken)
    error = error_of(job_file)
    assert error.key.startswith(key)
    assert allowed in error.allowed
    assert str(error).isprintable()
    assert len(str(error)) < 2000


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rollout.args.x=" + "[" * 20_000, None),
        ("rollout.args.x=" + "9" * 5000, None),
        ("job.max_steps=0x" + "f" * 5000, "job.max_steps"),
        ("job.se\udcc3de=1", "--set"),
        ("job.name=\udcc3", "--set"),
    ],
)
def test_override_of_any_text_is_taken_or_named(job_file: Path, override: str, key: str | None) -> None:
    if key is None:  # no TOML value, so it is text
        assert isinstance(load_job(job_file, [override]).rollout.args["x"], str)
    else:
        assert error_of(job_file, override).key == key


@pytest.mark.parametrize(
    ("lines", "overrides", "key"),
    [
        ('[redis]\nurl = "http://:sesame@h"', [], "redis.url"),
        ('[redis]\nurl = "redis://:sesame @h"', [], "redis.url"),
        ('[redis]\nurl = ["redis://:sesame@h"]', [], "redis.url"),
        ('[redis]\nsecret = "sesame"', [], "redis.secret"),
        ('[redis]\n"redis://:sesame@h" = 1', [], 'redis."(URL)"'),
        ('[[redis]]\nurl = "redis://:sesame@h"', [], "redis"),
        ('[reddis]\npassword = "sesame"', [], "reddis"),
        ('[timeouts]\nredis = "redis://:sesame@h"', [], "timeouts.redis"),
        ('[timeouts]\npassword = "sesame"', [], "timeouts.password"),
        ("", ["redis.url=http://:sesame@h"], "redis.url"),
        ("", ["redis.secret=sesame"], "redis.secret"),
        ("", ["redis=redis://:sesame@h"], "--set"),
        ("", ["redis://:sesame@h"], "--set"),
        ("", ["redisurl=redis://:sesame@h"], "--set"),
        ("", ["password=sesame"], "--set"),
        ("", ["redis.url=sesame", "redis.url.more=sesame"], "--set"),
        ("", ["redis.url=\udcc3sesame"], "--set"),
    ],
)
def test_no_message_about_a_mistake_holds_a_credential(
    job_file: Path, lines: str, overrides: list[str], key: str
) -> None:
    job_file.write_text(f"{SMALLEST}\n{lines}\n")
    with pytest.raises(ConfigError) as caught:
        load_job(job_file, overrides)
    assert key in [mistake.key for mistake in caught.value.mistakes]
    shown = "".join([*error_lines(caught.value), repr(caught.value), repr(vars(caught.value))])
    assert "sesame" not in shown


def test_a_url_that_is_allowed_is_in_no_repr_and_in_no_error_of_the_model(job_file: Path) -> None:
    config = load_job(job_file, ["redis.url=redis://:sesame@h"])
    assert config.redis.url == "redis://:sesame@h"
    document = config.model_dump(mode="json")
    document["redis"]["more"] = document["redis"]["url"]
    with pytest.raises(ValidationError) as caught:
        JobConfig.model_validate(document)
    assert "sesame" not in f"{config!r} {config} {config.redis!r} {caught.value!r} {caught.value}"


# --- drafts -----------------------------------------------------------------------------------------------------


def test_draft_has_what_is_right_and_defaults_for_what_is_wrong(job_file: Path) -> None:
    job_file.write_text(f"redis = 3\n{SMALLEST}")
    draft = draft_job(job_file, ["job.seed=-1", "job.lane=tcp", "policy.batch_size=many", "jobs.x=1"])
    assert (draft.config.job.seed, draft.config.job.lane, draft.config.redis.url) == (0, "tcp", None)
    assert draft.config.rollout.slots == 8
    assert not draft.knows("job.seed")
    assert not draft.knows("policy.batch_size")
    assert not draft.knows("redis.url")
    assert draft.knows("job.lane", "rollout.slots", "policy.trainer")
    assert len(draft.mistakes) == 4
    with pytest.raises(ConfigError):
        draft.checked()


def test_required_key_without_a_value_is_not_known(job_file: Path) -> None:
    job_file.write_text(SMALLEST.replace('name = "small"', "").replace("[policy]", "[other]"))
    draft = draft_job(job_file)
    assert not draft.knows("job.name")
    assert not draft.knows("policy.trainer")
    assert draft.knows("job.max_steps", "rollout.worker")


def test_rules_between_keys_that_are_right_are_checked_beside_other_mistakes(job_file: Path) -> None:
    broken = ["job.sede=3", "rollout.slots=3", "policy.replicas=3", "controller.dead_after=x"]
    with pytest.raises(ConfigError) as caught:
        load_job(job_file, broken)
    keys = ["job.sede", "controller.dead_after", "rollout.slots", "policy.batch_size"]
    assert sorted(each.key for each in caught.value.mistakes) == sorted(keys)


def test_fewer_work_items_are_in_flight_if_each_has_several_payloads(job_file: Path) -> None:
    several = ["policy.batch_size=8", "rollout.payloads_per_work_item=3"]
    assert load_job(job_file, several).work_items_in_flight == 6
    assert load_job(job_file, [*several, "policy.max_staleness=0"]).work_items_in_flight == 3
    assert load_job(job_file, [*several, "policy.max_staleness=1"]).work_items_in_flight == 5
    load_job(job_file, [*several, "rollout.work_items_in_flight=3"])
    with pytest.raises(ConfigError, match=r"divided by rollout\.payloads_per_work_item, which is 3"):
        load_job(job_file, [*several, "rollout.work_items_in_flight=2"])


def test_slots_are_enough_for_all_rollouts_that_may_end_before_the_first(job_file: Path) -> None:
    settings = ["policy.batch_size=8", "rollout.slots=15", "policy.max_staleness=1"]
    load_job(job_file, settings)
    with pytest.raises(ConfigError, match=r"rollout\.slots = 15 .* at least 16, for all payloads in flight"):
        load_job(job_file, [*settings, "rollout.concurrency=2"])


def test_sparse_weights_need_references(job_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.weights = .* must be .* with job\.transfer"):
        load_job(job_file, ["policy.weights=sparse", "job.transfer=inline"])


@pytest.mark.parametrize("items", ["items.jsonl", "data sets/items.jsonl", "data.py:ROWS", "package.data:rows"])
def test_data_set_is_a_file_of_lines_or_an_iterable(job_file: Path, items: str) -> None:
    work = load_job(job_file, [f'work.items="{items}"', "work.shuffle=true"]).work
    assert (work.items, work.shuffle) == (items, True)


@pytest.mark.parametrize("items", ["items.json", "items", ".jsonl", "data.py:", "a b.py:ROWS"])
def test_data_set_of_another_form_is_refused(job_file: Path, items: str) -> None:
    with pytest.raises(ConfigError, match=r'work\.items = .* must be "file\.jsonl"'):
        load_job(job_file, [f'work.items="{items}"'])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["work.shuffle=true"], r"work\.shuffle = True .* must be false without work\.items"),
        (["work.replay=recording", "work.items=rows.jsonl", "rollout.replicas=1"], r"work\.items = 'rows\.jsonl'"),
        (["work.replay=recording", "rollout.replicas=2"], r"rollout\.replicas = 2 .* must be 1 with work\.replay"),
    ],
)
def test_a_job_is_replayed_by_one_replica_in_order_or_has_a_data_set(
    job_file: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_job(job_file, settings)


def test_a_recording_takes_the_place_of_the_worker(job_file: Path) -> None:
    assert load_job(job_file, ["work.replay=recording", "rollout.replicas=1"]).worker == config.REPLAY_WORKER
    assert load_job(job_file).worker == load_job(job_file).rollout.worker


class Recorder:
    """A configuration that records which keys are read."""

    def __init__(self, found: object, read: set[str], path: str = "") -> None:
        self.found, self.read, self.path = found, read, path

    def __getattr__(self, name: str) -> object:
        own = vars(type(self.found)).get(name)
        if isinstance(own, property):
            assert own.fget is not None
            return own.fget(self)
        path = f"{self.path}.{name}".strip(".")
        value = getattr(self.found, name)
        if isinstance(value, config.Table):
            return Recorder(value, self.read, path)
        self.read.add(path)
        return value


@pytest.mark.parametrize(("keys", "rule"), config.RULES, ids=[rule.__name__ for _, rule in config.RULES])
def test_rule_reads_the_keys_that_it_names_and_no_others(
    job_file: Path, keys: frozenset[str], rule: config.Rule
) -> None:
    read: set[str] = set()
    for settings in (
        [],
        ["policy.ack=checkpoint", "policy.checkpoint_every=2"],
        ["job.transfer=inline"],
        ["policy.max_staleness=1"],
        ["policy.max_staleness=1", "rollout.concurrency=2"],
        ["policy.replicas=4", "policy.readers=2"],
        ["policy.weights=sparse"],
        ["policy.record=recording"],
        ["work.replay=recording", "rollout.replicas=1"],
    ):
        recorder = Recorder(load_job(job_file, settings), read)
        assert list(rule(recorder)) == []  # type: ignore[arg-type]
    assert read == keys


@pytest.mark.parametrize(("old", "new"), [("ucxx", "reference"), ("redis", "inline")])
def test_earlier_name_of_a_key_is_read_with_a_note(job_file: Path, old: str, new: str) -> None:
    draft = draft_job(job_file, [f"job.payload_transfer={old}"])
    assert draft.checked().job.transfer == new
    assert draft.notes == (f"job.payload_transfer is read as job.transfer, its new name: job.transfer = {new!r}",)
    assert draft_job(job_file).notes == ()


def test_key_under_both_names_is_a_mistake(job_file: Path) -> None:
    error = error_of(job_file, "job.payload_transfer=redis", "job.transfer=inline")
    assert error.key == "job.payload_transfer"
