"""python full_stack_transformer/scripts/run_experiment.py --data_class my_module.MyData."""

import sys
from pathlib import Path

# The folder of this script would otherwise shadow packages by its file names.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from full_stack_transformer.__main__ import main

if __name__ == "__main__":
    main(["run_experiment", *sys.argv[1:]])
