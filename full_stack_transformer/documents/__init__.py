"""Files -> documents, streamed: `formats` finds files, a format cuts them into blocks of documents.

    delimited text, JSON Lines   bytes, cut where a document ends   (also .gz, .zst)
    Parquet                      batches of rows

The reading thread cuts blocks, which is cheap and needs no decoding; workers turn them into documents.
Knows nothing of tokens.
"""
