"""A plain function that reads by processes which are not forked, as is Python's own choice from 3.14 on."""

from torch.utils.data import DataLoader, Dataset


class Squares(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, row):
        return float(row**2)


def total(trial):
    factor = trial.suggest_int("factor", 1, 1)
    loader = DataLoader(Squares(), batch_size=3, num_workers=1, multiprocessing_context="forkserver")
    return factor * sum(batch.sum().item() for batch in loader)
