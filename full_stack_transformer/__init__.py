"""From a folder of texts to a language model that people talk to.

Read the code in the order in which the data flows:

1. `arguments`         every option of every command, on one page
2. `documents`         files -> documents
3. `tokenization`      documents <-> token ids
4. `datasets`          documents -> dataset directory -> samples -> batches
5. `modelling`         backbones: new, pretrained, saved
6. `training`          dataset directory -> experiment directory with its model directory
7. `evaluation`        model directory + dataset directory -> figures
8. `generation`        model directory + prompt -> text
9. `serving`           model directory -> HTTP API
10. `telegram`         HTTP API -> Telegram bot

Beside them stand `errors` (one tree), `storage` (durable files and versions), `metrics` (figures of
predictions), `document_sources` (texts and labelled rows to start with) and `demo` (the whole road in one
command).
"""

__version__ = "0.1.0"
