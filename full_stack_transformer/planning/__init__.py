"""`fst plan`: time, cost, memory and disk of a training before it runs."""
