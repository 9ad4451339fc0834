"""How good predictions are: numbers and strings in, figures out.

Pure functions on sequences and numpy arrays. Knows no model, no tokenizer, no file; imports neither
torch nor transformers. Shares run from 0 to 1; only BLEU and chrF are written from 0 to 100, as
everywhere.
"""
