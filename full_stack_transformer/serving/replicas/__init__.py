"""`fst serve` on a cluster: replicas under Ray Serve, a front on every node. Only here is Ray imported."""
