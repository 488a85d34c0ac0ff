"""Which pictures a report shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_image import schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.show.cards import Card, RowName, card_columns, clean, fetch_cards, number_of, short
from nemo_image.datasets.show.charts import number
from nemo_image.datasets.show.pieces import DuplicateGroups, duplicate_groups
from nemo_image.datasets.show.plan import Plan
from nemo_image.datasets.show.survey import Survey
from nemo_image.datasets.show.thumbnails import safe_thumbnails

MOST_CARDS = 320
"""Pictures in a report at most; galleries get shorter where there are many."""

MOST_SCORES = 8
"""Scores that get galleries."""

MOST_VALUES = 24
"""Values of a card at most."""

RANDOM = 12


@dataclass
class Choice:
    """A gallery to fill: its heading, and the names of its rows."""

    title: str
    names: list[RowName] = field(default_factory=list)


class Selection:
    """The pictures that a report shows, chosen and fetched.

    Attributes
    ----------
    scores : list of str
        The columns that get galleries.
    n : int
        Pictures of each gallery.
    choices : dict of str to list of Choice
        The galleries of each score.
    reasons : dict of str to list of RowName
        Examples of each reason of image errors.
    some : list of RowName
        Rows drawn at random.
    groups : DuplicateGroups
    cards : dict of RowName to Card
        All but those of the groups.
    """

    def __init__(
        self,
        dataset: ImageTextPairDataset,
        plan: Plan,
        found: Survey,
        quantiles: tuple[float, ...],
        pictures: int,
        groups: int,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.found = found
        self.quantiles = quantiles
        source = dataset.source
        self._columns = card_columns(source)
        self.scores = list(plan.scores[:MOST_SCORES])
        reasons = [name for name, _ in found.reasons.most_common()]
        per_score = 2 + len(quantiles) + 2 * max((len(some) for some in plan.thresholds.values()), default=0)
        copies = min(5, max(1, MOST_CARDS // 4 // max(groups, 1) - 1))
        room = MOST_CARDS - groups * (copies + 1) - 12 - 2 * len(reasons)
        self.n = max(1, min(pictures, room // max(1, per_score * len(self.scores))))
        self.choices = {name: self._score_choices(name) for name in self.scores}
        self.reasons = {name: found.with_reason(name, 2) for name in reasons}
        self.some = found.sample(min(12, room))
        self.groups = DuplicateGroups([])
        if groups:
            self.groups = duplicate_groups(dataset.state, found, safe_thumbnails, groups, copies, self._columns)
        self.cards = self._fetched()
        self._veil()

    def _score_choices(self, name: str) -> list[Choice]:
        found, n = self.found, self.n
        spread = found.distributions[name]
        made = []
        for limit in self.plan.thresholds.get(name, ()):
            below, above = found.around(name, limit, n)
            made += [Choice(f"Just below {number(limit)}", below), Choice(f"At or just above {number(limit)}", above)]
        made.append(Choice("Highest", found.extremes(name, n, greatest=True)))
        for share in sorted(self.quantiles, reverse=True):
            at = spread.quantile(share)
            title = (
                f"Around the median, {number(at)}" if share == 0.5 else f"Around the {share:.4g} quantile, {number(at)}"
            )
            made.append(Choice(title, found.near(name, at, n)))
        made.append(Choice("Lowest", found.extremes(name, n, greatest=False)))
        return made

    def _fetched(self) -> dict[RowName, Card]:
        names = [name for some in self.choices.values() for one in some for name in one.names]
        names += [*self.some, *(name for some in self.reasons.values() for name in some)]
        cards = fetch_cards(names, self.dataset.source, safe_thumbnails, self._columns)
        for name, card in cards.items():
            numbers = self.found.values(name)
            # The scores of the galleries first: the last values are left out where there are many.
            mine = {clean(key, 60): short(numbers[key]) for key in (*self.scores, *numbers) if key in numbers}
            card.values = dict(list({**mine, **card.values}.items())[:MOST_VALUES])
            score = number_of(numbers.get(schema.NSFW_SCORE))
            card.unsafe = card.unsafe if score is None else score  # the frame's, which may differ from the file's
        return cards

    def _veil(self) -> None:
        limits = self.plan.thresholds.get(schema.NSFW_SCORE)
        if not limits:
            return
        for card in self.shown():
            card.veiled = card.unsafe is not None and card.unsafe >= min(limits)
        for group in self.groups.groups:
            # Of a kept row without a known score, its copies tell.
            if group.kept is not None and group.kept.unsafe is None:
                group.kept.veiled = any(card.veiled for card in group.copies)

    def shown(self) -> list[Card]:
        """Return the cards as they are shown: some more than once."""
        chosen = [name for some in self.choices.values() for one in some for name in one.names]
        names = [*self.some, *chosen, *(name for some in self.reasons.values() for name in some)]
        of_groups = [card for one in self.groups.groups for card in (one.kept, *one.copies) if card is not None]
        return [*(self.cards[name] for name in names), *of_groups]

    @property
    def unreadable(self) -> dict[str, str]:
        """Shards of the dataset whose pictures could not be read, with the cause."""
        shards = set(self.dataset.shards)  # copies may be of another dataset's rows
        lost = {card.lost_shard: card.reason or "" for card in self.shown() if card.lost_shard in shards}
        return {str(shard): cause for shard, cause in lost.items()}

    @property
    def pictures(self) -> int:
        """Pictures that are shown: those that could be decoded."""
        return sum(card.jpeg is not None for card in self.shown())
