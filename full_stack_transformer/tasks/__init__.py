"""One small class per task: rows -> features -> batches -> scores -> predictions, to train and to serve.

Knows nothing of files, of datasets and of Lightning. The rows' fields stand at the top of each task's file.
"""
