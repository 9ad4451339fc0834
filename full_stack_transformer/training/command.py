"""`fst train` and `fst run_experiment`: in this process, or with --ray_address in those of a cluster."""

from pathlib import Path

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.processes import launch


def main(arguments: TrainArguments) -> Path | int:
    """The experiment directory, or an exit code after a signal or from the cluster.

    Raises:
        FullStackTransformerError: as `training.run.main`, and where there is no cluster.
    """
    # Imported here: torch takes seconds, and a command that only starts others needs none.
    group = launch()
    if arguments.ray_address is not None and group is not None and group.ray_address is None:
        raise UsageError(
            "--ray_address starts the processes by itself; start the command without torchrun and srun"
        )
    if arguments.ray_address is not None and group is None:
        from full_stack_transformer.ray_cluster import imported_ray

        imported_ray()
        from full_stack_transformer.training.ray_group import train_on_ray

        return train_on_ray(arguments)
    from full_stack_transformer.training.run import main as train

    return train(arguments)
