"""Which replica gets a request."""

from full_stack_transformer.serving.replicas.affinity import Affinity


def test_a_beginning_comes_back_to_the_replica_that_read_it() -> None:
    affinity = Affinity(margin=4)
    affinity.note([b"one", b"two"], "a")
    affinity.note([b"one", b"other"], "b")
    queues = {"a": 2, "b": 0, "c": 0}
    assert affinity.choose([b"one", b"two", b"three"], queues) == "a"
    assert affinity.choose([b"one", b"other"], queues) == "b"
    assert affinity.choose([b"one", b"new"], queues) == "b", (
        "of two readers the one with less to do"
    )


def test_a_queue_that_is_too_long_outweighs_what_a_replica_knows() -> None:
    affinity = Affinity(margin=4)
    affinity.note([b"one"], "a")
    assert affinity.choose([b"one"], {"a": 5, "b": 1}) == "a"
    assert affinity.choose([b"one"], {"a": 6, "b": 1}) == "b"


def test_an_unknown_beginning_goes_to_a_shortest_queue() -> None:
    affinity = Affinity(margin=4)
    assert affinity.choose([b"one"], {"a": 1, "b": 0}) == "b"
    assert affinity.choose([], {"a": 1, "b": 0}) == "b"


def test_fronts_that_know_nothing_choose_alike_and_use_every_replica() -> None:
    queues = dict.fromkeys("abcd", 0)
    blocks = [str(number).encode() for number in range(100)]
    chosen = [Affinity(margin=4).choose([block], queues) for block in blocks]
    assert chosen == [Affinity(margin=1).choose([block], queues) for block in blocks]
    assert all(10 < chosen.count(name) < 40 for name in queues)


def test_a_replica_that_is_gone_is_forgotten() -> None:
    affinity = Affinity(margin=4)
    affinity.note([b"one"], "a")
    assert affinity.choose([b"one"], {"b": 3}) == "b"
    affinity.keep({"b"})
    assert affinity.choose([b"one"], {"a": 1, "b": 0}) == "b"
