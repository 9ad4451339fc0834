"""python full_stack_transformer/scripts/train.py --dataset_dir data/datasets/nietzsche."""

import sys
from pathlib import Path

# The folder of this script would otherwise shadow packages by its file names.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from full_stack_transformer.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
