"""The page of a report: what its template is given, all of it bounded."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nemo_image import __version__, schema
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.datasets.show.cards import Card, clean
from nemo_image.datasets.show.charts import Chart, chart_of, number
from nemo_image.datasets.show.distribution import Distribution
from nemo_image.datasets.show.picks import SAMPLE_ROWS
from nemo_image.datasets.show.plan import Plan
from nemo_image.datasets.show.render import environment, style
from nemo_image.datasets.show.survey import CAPTION_LENGTH, Survey
from nemo_image.reports.selection import MOST_SCORES, Selection

MOST_CHARTS, MOST_COLUMNS, MOST_RUNS, MOST_NAMED = 24, 100, 12, 20
_JSON_CHARACTERS = 3000
_TEMPLATES = Path(__file__).parent / "templates"

_MEANING = {
    schema.AESTHETIC_SCORE: "the LAION rating scale, about 1 to 10; higher is better",
    schema.NSFW_SCORE: "0 to 1; higher is less safe",
    schema.CLIP_SCORE: "cosine of the picture and its caption; higher is closer",
}
_BY_DEDUP = (schema.MAX_SIMILARITY, "hash_distance", schema.CENTROID_DISTANCE)


@dataclass
class ScoreSection:
    """What is shown of a score."""

    name: str
    meaning: str
    chart: Chart
    shares: list[str]
    galleries: list[tuple[str, list[Card]]]


class Page:
    """A report's page.

    Parameters
    ----------
    dataset : ImageTextPairDataset
    plan : Plan
    found : Survey
        Of the dataset.
    selection : Selection
        The pictures.
    accounts : dict or None
        Of the runs that wrote the dataset.
    """

    def __init__(
        self,
        dataset: ImageTextPairDataset,
        plan: Plan,
        found: Survey,
        selection: Selection,
        accounts: dict[str, Any] | None,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.found = found
        self.selection = selection
        self.accounts = accounts

    def render(self, title: str | None) -> str:
        """Return the page."""
        found, source = self.found, self.dataset.source
        others = [name for name in self._numbers() if name not in self.selection.scores and name not in _BY_DEDUP]
        lost = self.selection.unreadable
        now = datetime.datetime.now(datetime.UTC)
        page: str = (
            environment(_TEMPLATES)
            .get_template("report.html")
            .render(
                style=style() + (_TEMPLATES / "report.css").read_text(encoding="utf-8"),
                title=clean(title or self.dataset.path, 200),
                path=clean(self.dataset.path, 300),
                tars=clean(source.tar_root, 300),
                made=now.strftime("%Y-%m-%d %H:%M UTC"),
                stamp=now.isoformat(timespec="seconds"),
                version=__version__,
                tiles=self._tiles(),
                some=[self.selection.cards[name] for name in self.selection.some],
                scores=[self._score(name) for name in self.selection.scores],
                charts=[chart_of(clean(name, 60), found.distributions[name]) for name in others[:MOST_CHARTS]],
                not_drawn=[clean(name, 60) for name in [*self.plan.scores[MOST_SCORES:], *others[MOST_CHARTS:]]][:200],
                duplicates=self._duplicates(),
                clusters=self._clusters(),
                reasons=self._reasons(),
                runs=self._runs(),
                problems=[clean(one, 500) for one in (self.accounts or {}).get("problems", [])],
                unreadable=[(clean(a, 100), clean(b, 300)) for a, b in list(found.failures.items())[:MOST_NAMED]],
                unreadable_count=len(found.failures),
                no_pictures=[(clean(a, 100), clean(b, 300)) for a, b in list(lost.items())[:MOST_NAMED]],
                no_pictures_count=len(lost),
                fingerprints=self._fingerprints(),
                columns=self._columns_said(),
                rows=found.rows,
                sampled=min(SAMPLE_ROWS, found.rows),
                is_sample=found.rows > SAMPLE_ROWS,
                groups_exact=found.groups.is_exact,
                pictures=self.selection.pictures,
                per_gallery=self.selection.n,
                veiled=sum(card.veiled for card in self.selection.shown()),
            )
        )
        return page

    def _numbers(self) -> list[str]:
        sizes = [name for name in (schema.WIDTH, schema.HEIGHT) if name in self.plan.numbers]
        lengths = [CAPTION_LENGTH] if CAPTION_LENGTH in self.found.distributions else []
        names = dict.fromkeys([*sizes, *lengths, *self.plan.numbers])
        return [name for name in names if name in self.found.distributions]

    def _tiles(self) -> list[tuple[str, str, str]]:
        """Return what stands first: name, value, remark."""
        found, rows = self.found, self.found.rows
        shards = len(self.dataset.shards)
        tiles = [("rows", f"{rows:,}", f"in {shards:,} {'shard' if shards == 1 else 'shards'}")]
        if schema.IMAGE_ERROR in self.plan.columns:
            bad = found.reasons.total()
            tiles.append(("with an image error", f"{bad:,}", _share(bad, rows)))
        if schema.IS_DUPLICATE in self.plan.columns:
            tiles.append(
                ("copies of others", f"{found.duplicates:,}", f"{_share(found.duplicates, rows)}; kept {found.kept:,}")
            )
        if CAPTION_LENGTH in found.distributions:
            captions = found.distributions[CAPTION_LENGTH].count
            tiles.append(("with a caption", f"{captions:,}", _share(captions, rows)))
        for name in self.selection.scores[:2]:
            spread = found.distributions[name]
            tiles.append((f"median {clean(name, 40)}", number(spread.quantile(0.5)), f"{spread.count:,} scored"))
        return tiles

    def _score(self, name: str) -> ScoreSection:
        found = self.found
        spread = found.distributions[name]
        limits = self.plan.thresholds.get(name, ())
        shares = []
        for limit in limits:
            passed = found.not_below[name, limit]
            shares.append(
                f"{passed:,} of {spread.count:,} scored rows ({_share(passed, spread.count)}) are at or above "
                f"{number(limit)}; {spread.count - passed:,} are below."
            )
        model = self.dataset.provenance.get(name, {})
        parts = [_MEANING.get(name, ""), _made_by(model)]
        return ScoreSection(
            clean(name, 60),
            "; ".join(part for part in parts if part),
            chart_of(clean(name, 60), spread, limits),
            shares,
            [(one.title, [self.selection.cards[row] for row in one.names]) for one in self.selection.choices[name]],
        )

    def _duplicates(self) -> dict[str, Any] | None:
        found = self.found
        if schema.IS_DUPLICATE not in self.plan.columns:
            return None
        sizes = found.groups.copies + 1
        charts = (
            [chart_of("pictures in a group", Distribution.of(pa.array(sizes)), unit="groups")] if len(sizes) else []
        )
        charts += [chart_of(name, found.distributions[name]) for name in _BY_DEDUP if name in found.distributions]
        return {
            "removed": found.duplicates,
            "kept": found.kept,
            "unjudged": found.rows - found.duplicates - found.kept,
            "tiers": found.tiers.most_common(),
            "groups": found.groups.count,
            "charts": charts,
            "shown": self.selection.groups.groups,
        }

    def _clusters(self) -> dict[str, Any] | None:
        counts = self.found.clusters
        if not counts:
            return None
        largest = counts.most_common(MOST_NAMED)
        return {
            "count": len(counts),
            "rows": counts.total(),
            "chart": chart_of("rows in a cluster", Distribution.of(pa.array(list(counts.values()))), unit="clusters"),
            "largest": [(f"cluster {name}", count, 100 * count / largest[0][1]) for name, count in largest],
        }

    def _reasons(self) -> list[dict[str, Any]]:
        counts = self.found.reasons.most_common()
        return [
            {
                "name": name,
                "count": count,
                "share": _share(count, self.found.rows),
                "width": 100 * count / counts[0][1],
                "cards": [self.selection.cards[row] for row in self.selection.reasons[name]],
            }
            for name, count in counts
        ]

    def _runs(self) -> list[dict[str, Any]]:
        folders = self.accounts["folders"] if self.accounts else []
        root = folders[0]["path"] if folders else ""
        runs = [
            {**run, "inside": clean(one["path"].removeprefix(root).strip("/"), 200)}
            for one in folders
            for run in one["runs"]
        ]
        runs.sort(key=lambda run: run["time"] or "")
        for run in runs:
            run["lost"] = sum(run["losses"].values())
            run["failed"] = [(clean(a, 100), clean(b, 300)) for a, b in list(run["failed_shards"].items())[:MOST_NAMED]]
            run["notes"] = [clean(one, 300) for one in run["notes"][:MOST_NAMED]]
            run["kind"] = clean(run["kind"], 80)
        return runs[-MOST_RUNS:][::-1]

    def _fingerprints(self) -> list[dict[str, Any]]:
        """Return what made the columns, those together that the same made."""
        alike: dict[str, list[str]] = {}
        for name, made in self.dataset.provenance.items():
            alike.setdefault(json.dumps(made, sort_keys=True, default=str), []).append(name)
        found = []
        for text, names in list(alike.items())[:MOST_COLUMNS]:
            made = json.loads(text)
            pretty = json.dumps(made, indent=2, ensure_ascii=False)
            found.append(
                {
                    "columns": [clean(name, 60) for name in names[:MOST_COLUMNS]],
                    "by": _made_by(made) or "unknown",
                    "weights": clean(made.get("weights_sha256") or "", 64),
                    "json": pretty if len(pretty) <= _JSON_CHARACTERS else pretty[:_JSON_CHARACTERS] + "\n…",
                }
            )
        return found

    def _columns_said(self) -> list[tuple[str, str]]:
        kinds = self.dataset.source.schema
        names = list(self.dataset.metadata.columns)[:MOST_COLUMNS]
        said = {one.name: str(one.type) for one in kinds}
        return [
            (clean(name, 60), clean(said.get(name, "added in the frame" if name != schema.SHARD else "string"), 60))
            for name in names
        ]


def _made_by(made: Mapping[str, Any]) -> str:
    operator = str(made.get("operator") or "").rpartition(".")[2]
    return clean(" · ".join(one for one in (operator, str(made.get("model") or "")) if one), 120)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
