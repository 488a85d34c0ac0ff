"""Pictures, histograms and groups of copies: what a notebook shows, and what a report is made of."""

from nemo_image.datasets.show.cards import Card
from nemo_image.datasets.show.facade import Showing
from nemo_image.datasets.show.pieces import DuplicateGroups, Galleries, Gallery, Histograms

__all__ = ["Card", "DuplicateGroups", "Galleries", "Gallery", "Histograms", "Showing"]
