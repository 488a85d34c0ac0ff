"""clip-retrieval's folders of embeddings, in and out.

``clip-inference`` of `clip-retrieval <https://github.com/rom1504/clip-retrieval>`_ writes
``img_emb/img_emb_<i>.npy`` (and ``text_emb/text_emb_<i>.npy``), one embedding a row, and for each row of them a row of
``metadata/metadata_<i>.parquet``. Its files are not the dataset's shards: rows meet by id.
"""

from __future__ import annotations

import copy
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from dask.base import tokenize
from fsspec.implementations.local import LocalFileSystem

from nemo_image import backend, schema
from nemo_image.datasets import opening, save, scattered
from nemo_image.datasets.image_text_pair import ImageTextPairDataset
from nemo_image.datasets.load import id_positions, require_unique
from nemo_image.datasets.partitions import shard_tasks
from nemo_image.datasets.source import DatasetSource
from nemo_image.engine.ledger import ShardRecord
from nemo_image.errors import ArgumentError, DatasetError, EmbeddingError, IdMismatchError, NemoImageError
from nemo_image.shards import files, parquet
from nemo_image.shards.keys import plain_ids
