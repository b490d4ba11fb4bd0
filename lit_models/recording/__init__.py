"""Training runs on disk: which examples each optimizer step used, and what happened to the metrics of test examples.

A run is a folder with `run.json` and part files `part-rRANK-NUMBER.safetensors` (schema 1). A part holds the rows of
some steps; it is written under another name and moved into place when it is whole, so that a killed process leaves a
shorter run and never a broken one:

| key | dtype, shape | meaning |
|---|---|---|
| `step` | int64 [s] | optimizer steps of this part, ascending, from 1 |
| `offsets` | int64 [s+1] | where the ids of each step begin and end |
| `ids` | int32 [sum of B] | pool ids of each step, with repeats |
| `lr` | float32 [s,groups] | learning rates used by the step |
| `skipped` | uint8 [s] | 1 where the update was skipped |
| `train_loss`, `grad_norm` | float32 [s] | optional |
| `rec_step` | int64 [q] | steps after which metrics were measured; 0 is before training |
| `cols` | int32 [m] | positions of this file's tests in `test_ids` of `run.json`; absent: all M |
| `m.NAME` | float32 or float16 [q,m] | metric after `rec_step`; NaN: not measured |
| `nan.NAME` | int32 [k,2] | optional; row and column of values that were measured and are NaN |

Every process of a run writes its own parts; `features-rRANK.safetensors` may hold features of tests and pool examples
before the first step (`test_ids`, `tests`, `pool_ids`, `pool`). The texts of an experiment are kept once, in
`pool.jsonl` and `tests.jsonl` beside the run folders: rows with `id`, `text` and, where there are any, `target` and
`context`.

This package knows neither Lightning nor any method; the recorder writes with it, and data modules read with it.
"""

from lit_models.recording.examples import fingerprint as fingerprint
from lit_models.recording.examples import read_examples as read_examples
from lit_models.recording.examples import write_examples as write_examples
from lit_models.recording.files import find_runs as find_runs
from lit_models.recording.files import read_info as read_info
from lit_models.recording.files import read_lines as read_lines
from lit_models.recording.files import write_atomically as write_atomically
from lit_models.recording.ids import Ids as Ids
from lit_models.recording.parquet import write_parquet as write_parquet
from lit_models.recording.reader import DynamicsRun as DynamicsRun
from lit_models.recording.writer import RunWriter as RunWriter
from lit_models.recording.writer import write_features as write_features
from lit_models.recording.writer import write_run as write_run
