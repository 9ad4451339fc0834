"""Metrics of several replicas."""

from full_stack_transformer.serving.replicas.metrics import merged


def test_metrics_of_replicas_are_told_apart() -> None:
    one = b'# HELP a About.\n# TYPE a gauge\na{m="x"} 1.0\n# HELP b Other.\n# TYPE b gauge\nb 2.0\n'
    assert merged([("r1", one), ("r2", one)]).decode().splitlines() == [
        "# HELP a About.",
        "# TYPE a gauge",
        'a{replica="r1",m="x"} 1.0',
        'a{replica="r2",m="x"} 1.0',
        "# HELP b Other.",
        "# TYPE b gauge",
        'b{replica="r1"} 2.0',
        'b{replica="r2"} 2.0',
    ]
    assert merged([]) == b""
