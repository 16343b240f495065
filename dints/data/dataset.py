from dataclasses import dataclass
from dints.data.opening import open_dataset, names as names_of
from dints.data.listing import split_fold
from dints.data.leniency import Leniency
from dints.running.seeds import permutation
@dataclass(frozen=True)
class Fold:
    task: object
    training: list
    validation: list
    measured: object
    @property
    def cases(self): return [*self.training, *self.validation]
    @property
    def names(self): return names_of(self.cases)
    def halves(self, seed):
        order = permutation(len(self.training), seed, "halves")
        middle = len(self.training) // 2
        return [self.training[n] for n in order[:middle]], [self.training[n] for n in order[middle:]]
def open_fold(settings, measured_in=(), least_training=1):
    d = open_dataset(settings.root, settings.json, settings.json_key, leniency=Leniency(settings.trust_shapes, settings.replace_nonfinite), measured_in=measured_in, spacing=settings.spacing, intensity=settings.intensity_range, patch_size=settings.patch_size)
    t, v = split_fold(d.cases, settings.num_folds, settings.fold, least_training)
    return Fold(d.task, t, v, d.measured)
