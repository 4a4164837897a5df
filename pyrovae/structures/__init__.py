r"""Models beyond one latent and complete data: hierarchies, missing values, labels for some of the data,
sequences.

Each has a ``.model`` and a ``.guide``, which are used as those of a :class:`pyrovae.VAE`. :func:`repair` draws hidden
parts of data from a VAE that was trained on whole ones. A :class:`Structure` is an option of ``pyrovae train``.
"""

from pyrovae.structures.assembly import (
    DenseHierarchy,
    Hierarchy,
    Incomplete,
    Ladder,
    Recurrent,
    SemiSupervised,
    StateSpace,
    Structure,
)
from pyrovae.structures.completion import Repair, repair
from pyrovae.structures.hierarchies import DenseHierarchicalVAE, HierarchicalVAE, LadderVAE
from pyrovae.structures.missing import MissingDataVAE
from pyrovae.structures.recurrent import ForwardGRU, RecurrentVAE
from pyrovae.structures.semi_supervised import ClassifierELBO, SemiSupervisedVAE
from pyrovae.structures.sequences import SequenceVAE
from pyrovae.structures.smoothing import Smoothed
from pyrovae.structures.state_space import BackwardGRU, StateSpaceVAE
from pyrovae.structures.tables import TableFeatures, fit_independent_columns, log_prob_of_cells, table_vae

__all__ = [
    "BackwardGRU",
    "ClassifierELBO",
    "DenseHierarchicalVAE",
    "DenseHierarchy",
    "ForwardGRU",
    "HierarchicalVAE",
    "Hierarchy",
    "Incomplete",
    "Ladder",
    "LadderVAE",
    "MissingDataVAE",
    "Recurrent",
    "RecurrentVAE",
    "Repair",
    "SemiSupervised",
    "SemiSupervisedVAE",
    "SequenceVAE",
    "Smoothed",
    "StateSpace",
    "StateSpaceVAE",
    "Structure",
    "TableFeatures",
    "fit_independent_columns",
    "log_prob_of_cells",
    "repair",
    "table_vae",
]
