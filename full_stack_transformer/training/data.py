"""The batches of a dataset directory, for Lightning."""

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader

from full_stack_transformer.datasets.batches import LengthBatchSampler
from full_stack_transformer.datasets.collators import CausalCollator
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.datasets.description import DatasetDirectory

Batch = dict[str, Tensor]


class DatasetDataModule(pl.LightningDataModule):
    """Train and validation loaders over memory-mapped corpora.

    Loads in the training process: a worker's copies between processes cost 10 to 100 times what they save.
    """

    def __init__(self, dataset: DatasetDirectory, *, batch_size: int, seed: int) -> None:
        super().__init__()
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches in the order of the seed and the epoch."""
        return self._loader(self._dataset.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches in the order of their length."""
        return self._loader(self._dataset.valid, shuffle=False)

    def _loader(self, corpus: Corpus, *, shuffle: bool) -> DataLoader[Batch]:
        sampler = LengthBatchSampler(
            corpus.lengths(),
            batch_size=self._batch_size,
            seed=self._seed,
            shuffle=shuffle,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        collator = CausalCollator(self._dataset.description["special_token_ids"]["pad"])
        return DataLoader(corpus, batch_sampler=sampler, collate_fn=collator, num_workers=0)  # type: ignore[arg-type]
