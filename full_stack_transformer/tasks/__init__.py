"""One file per task: what it reads, its batches, loss, metrics, baselines, model card and HTTP route.

Read `task.py` first. `catalogue.py` lists the tasks; nothing outside this folder names one.
"""
