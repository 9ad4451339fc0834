"""From a folder of texts to a language model that people talk to.

Read the code in the order of the data:

    arguments          the options of all commands
    documents          files -> documents
    tokenization       documents <-> token ids
    preparation        documents -> dataset directory
    datasets           dataset directory -> samples -> batches
    rows               files -> labelled rows
    modelling          new, pretrained and saved models; losses
    tasks              one file per training objective
    training           batches -> experiment directory with a model directory
    metrics            predictions -> metrics
    evaluation         model directory + data -> metrics
    generation         model directory + prompt -> text
    serving            model directory -> HTTP API
    telegram           HTTP API -> Telegram bot

`command_line` lists the commands, and `first_checks` looks at their paths and ports before torch is imported.
Used everywhere: `errors` (the exception tree), `storage` (durable files, version directories) and `machine`
(what the hardware can do). `document_sources` writes documents and labelled rows to start with, and has the
demo.
"""

__version__ = "0.1.0"
