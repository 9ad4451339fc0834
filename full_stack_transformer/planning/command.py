"""`fst plan`: what a training will take, before it runs.

fst plan --tokens 1e7 --parameters 2e6

    options ──job──> model, tokens, batches ──stages──> time, cost, memory, disk ──page──> table, commands

This machine is measured for some seconds by the code of the commands; GPUs are looked up. Writes nothing.
"""

import json
import sys

from full_stack_transformer.arguments.planning import PlanArguments
from full_stack_transformer.planning.job import job_of
from full_stack_transformer.planning.page import as_json, page
from full_stack_transformer.planning.stages import make_plan


def main(arguments: PlanArguments) -> int:
    """Print the plan; always 0, also for what is impossible, which the plan says.

    Raises:
        UsageError: the options contradict each other.
        DatasetError: --dataset_dir is no dataset directory.
        DocumentsError: the documents to measure with cannot be read.
        MachineError: memory is short for measuring.
    """
    plan = make_plan(arguments, job_of(arguments))
    if arguments.json:
        text = json.dumps(as_json(arguments, plan), indent=2)
    else:
        text = "\n".join(page(arguments, plan))
    sys.stdout.write(f"{text}\n")
    return 0
