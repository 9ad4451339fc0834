"""How good predictions are: numbers and strings in, metrics out.

Names and forms of the results; scikit-learn, scipy, seqeval, sacrebleu and rouge-score compute them. They
belong to the extra `evaluation` and are imported when a metric is computed: scikit-learn alone takes a
second. Knows no model, no tokenizer, no file. Metrics run from 0 to 1; only BLEU and chrF run from 0 to 100,
as usual.
"""
