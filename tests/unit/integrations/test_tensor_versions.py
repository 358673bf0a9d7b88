"""Models as versions: every byte arrives, in place on one host and bucket by bucket from another."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dray.errors import ConfigError, StreamError, StreamTimeout

torch = pytest.importorskip("torch")

from dray.integrations.tensor_versions import (  # noqa: E402
    Place,
    Secret,
    TensorPublisher,
    TensorSubscriber,
    read_secret,
    this_host,
)

SECONDS = 20.0
BUCKET = 1 << 16
Model = dict[str, "torch.Tensor"]


def model(seed: int, layers: int = 4) -> Model:
    make = torch.Generator().manual_seed(seed)
    found: Model = {"scale": torch.rand((), generator=make), "none": torch.empty(0, 3)}
    for layer in range(layers):
        found[f"layers.{layer}.weight"] = torch.randn(64, 130, generator=make).to(torch.bfloat16)
        found[f"layers.{layer}.bias"] = torch.randn(7, generator=make)
        found[f"layers.{layer}.mask"] = torch.rand(5, generator=make) > 0.5
        found[f"layers.{layer}.small"] = torch.randn(33, generator=make).to(torch.float8_e4m3fn)
    found["head"] = torch.randn(300, 200, generator=make).T  # not contiguous, and larger than a bucket
    return found


def publish(publisher: TensorPublisher, weights: Model, step: int | None = None) -> None:
    with publisher.version(step) as add:
        for name, tensor in weights.items():
            if tensor is None:
                raise TypeError("no tensor")
            scratch = tensor.clone()
            add(name, scratch)
            scratch.zero_()  # as a buffer that is used again


def received(subscriber: TensorSubscriber, after: int | None = None, step: int | None = None) -> Model:
    found = {}
    for bucket in subscriber.buckets(after=after, step=step, timeout=SECONDS):
        found |= {name: tensor.clone() for name, tensor in bucket}
    return found


def assert_same(found: Model, sent: Model) -> None:
    assert list(found) == list(sent)
    for name, tensor in sent.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (found[name], tensor)]
        assert torch.equal(*bits), name


@pytest.fixture(params=["this host", "another host", "another host, sparse"])
def pair(request: pytest.FixtureRequest) -> Iterator[Callable[[], tuple[TensorPublisher, TensorSubscriber]]]:
    made: list[TensorPublisher | TensorSubscriber] = []
    delta = "sparse" if "sparse" in request.param else "full"

    def make() -> tuple[TensorPublisher, TensorSubscriber]:
        remote = "another" in request.param
        publisher = TensorPublisher(
            bucket_bytes=BUCKET, timeout=SECONDS, delta=delta, listen="tcp://127.0.0.1:0" if remote else ()
        )
        made.append(publisher)
        place: Place = pickle.loads(pickle.dumps(publisher.place))  # noqa: S301
        subscriber = TensorSubscriber(place._replace(host="of another") if remote else place, delta=delta)
        made.append(subscriber)
        return publisher, subscriber

    yield make
    for each in reversed(made):
        each.close()
        each.close()


Pair = Callable[[], tuple[TensorPublisher, TensorSubscriber]]


def test_every_byte_of_several_versions_arrives(pair: Pair) -> None:
    publisher, subscriber = pair()
    for version in range(1, 6):
        after = publisher.place.version
        publish(publisher, model(version), step=version * 10)
        assert_same(received(subscriber, after, version * 10), model(version))
        assert publisher.place.version == version


def test_tensors_may_come_go_and_change_between_versions(pair: Pair) -> None:
    publisher, subscriber = pair()
    longer, shorter = model(1, layers=6), model(2, layers=2)
    renamed = {("other" if name == "scale" else name): tensor for name, tensor in shorter.items()}
    for weights in (longer, longer, shorter, renamed, longer, {}, shorter):
        after = publisher.place.version
        publish(publisher, weights)
        assert_same(received(subscriber, after), weights)


def test_a_receiver_that_comes_late_gets_the_newest_version(pair: Pair) -> None:
    publisher, subscriber = pair()
    for version in (1, 2):
        publish(publisher, model(version))
    assert_same(received(subscriber), model(2))


def test_an_update_that_fails_leaves_the_version_before(pair: Pair) -> None:
    publisher, subscriber = pair()
    publish(publisher, model(1))
    with pytest.raises(TypeError):
        publish(publisher, {"scale": torch.ones(()), "none": None})
    assert_same(received(subscriber), model(1))
    publish(publisher, model(2))
    assert_same(received(subscriber, 1), model(2))


def test_a_version_of_another_step_is_refused(pair: Pair) -> None:
    publisher, subscriber = pair()
    publish(publisher, model(1), step=7)
    with pytest.raises(StreamError, match="of step 7, not of step 8"):
        received(subscriber, step=8)


def test_a_version_that_does_not_come_is_reported_in_time(pair: Pair) -> None:
    publisher, subscriber = pair()
    publish(publisher, model(1))
    with pytest.raises(StreamTimeout):
        list(subscriber.buckets(after=1, timeout=0.1))


def test_on_one_host_tensors_are_not_copied_and_outlive_later_versions() -> None:
    weights = {"w": torch.arange(1000, dtype=torch.float32)}
    with (
        TensorPublisher(versions=3, timeout=SECONDS) as publisher,
        TensorSubscriber(publisher.place) as subscriber,
    ):
        publish(publisher, weights)
        (first,) = [tensor for bucket in subscriber.buckets(timeout=SECONDS) for _, tensor in bucket]
        (again,) = [tensor for bucket in subscriber.buckets(timeout=SECONDS) for _, tensor in bucket]
        assert first.data_ptr() == again.data_ptr()
        del again
        for _ in range(3):
            publish(publisher, {"w": torch.zeros(1000)})
        assert torch.equal(first, weights["w"])
        del first


def test_a_version_that_is_replaced_while_it_is_read_from_another_host_is_reported() -> None:
    with TensorPublisher(bucket_bytes=BUCKET, timeout=SECONDS, listen="tcp://127.0.0.1:0") as publisher:
        publish(publisher, model(1))
        with TensorSubscriber(publisher.place._replace(host="of another")) as subscriber:
            buckets = subscriber.buckets(timeout=SECONDS)
            next(buckets)
            publish(publisher, model(2))
            with pytest.raises(StreamError, match="version 1 was replaced by version 2"):
                list(buckets)
            assert_same(received(subscriber), model(2))


def test_a_receiver_on_another_host_needs_an_address() -> None:
    with TensorPublisher() as publisher, pytest.raises(ConfigError, match="listen is missing"):
        TensorSubscriber(publisher.place._replace(host="of another"))


def test_secrets_come_from_files_and_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"sixteen bytes or more")
    monkeypatch.delenv("DRAY_SECRET_FILE", raising=False)
    assert read_secret(None) is None
    assert read_secret(str(file)) == b"sixteen bytes or more"
    monkeypatch.setenv("DRAY_SECRET_FILE", str(file))
    assert read_secret(None) == b"sixteen bytes or more"
    with pytest.raises(ConfigError, match="a file that can be read"):
        read_secret(str(tmp_path / "missing"))
    place = Place("name", "scope", this_host(), (), Secret(b"sixteen bytes or more"), 0)
    assert "sixteen" not in repr(pickle.loads(pickle.dumps(place)))  # noqa: S301
