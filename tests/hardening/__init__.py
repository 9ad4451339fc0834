"""What the service must survive, as commands: `python -m tests.hardening.NAME --help`.

    hostile      hundreds of raw requests that are wrong in every way
    schema_fuzz  thousands of requests made from the OpenAPI description (schemathesis)
    overload     ten times the load that it can serve; slow sockets beside honest clients
    disconnects  clients that go away at random moments
    sigterm      the end in the middle of work, again and again
    soak         half an hour of mixed load, with an eye on the memory
    memory       many and long texts under a limit of memory

Each starts a service of its own on a tiny model with random weights, or on `--model`. test_hardening.py runs
each for a few seconds.
"""
