"""Files -> documents, streamed in blocks: `files` opens, a format cuts blocks, a block gives documents.

    delimited text, JSON Lines   bytes, cut where a document ends   (also .gz, .zst)
    Parquet                      batches of rows

A block is cut by the reading thread and turned into documents by a worker, so cutting is cheap and needs no
decoding. Knows nothing of tokens.
"""
