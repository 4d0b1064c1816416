"""Partition files and stage maps: what they may say, and the wording of what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpipe.config.original.files import PartitionFile, StageMaps, read_partition_file, read_stage_maps
from vpipe.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "file.json"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('{"partition": [12, 13], "recompute_ratio": [0.3, 0]}', PartitionFile([12, 13], [0.3, 0.0])),
        ('{"partition": [12, 13]}', PartitionFile([12, 13], None)),
        ('{"recompute_ratio": [0.5, 0]}', PartitionFile(None, [0.5, 0.0])),
        (
            '{ // as guides print it\n  "partition": [12, 13], // "blocks"\n  "recompute_ratio": [0, 0] }',
            PartitionFile([12, 13], [0.0, 0.0]),
        ),
        ('{"partition": [1], "policies": ["swap"]}', PartitionFile([1], None, ["swap"])),
        (
            '{"partition": [1, 1], "recompute_ahead": [1]}',
            PartitionFile([1, 1], None, besides={"recompute_ahead": [1]}),
        ),
        ('{"partition": [1, 1], "swap_versions": [0]}', PartitionFile([1, 1], None, besides={"swap_versions": [0]})),
    ],
)
def test_partition_file(tmp_path: Path, text: str, content: PartitionFile) -> None:
    assert read_partition_file(written(tmp_path, text)) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ", line 1, column 2: Expecting property name enclosed in double quotes"),
        ('{"a//b": 1} // "', ": a//b = 1 is not a known key; known here: partition, recompute_ratio"),
        ('// one\n{"partition" [1]}', ", line 2, column 14: Expecting ':' delimiter"),
        ("[12, 13]", ": is not a JSON object with the keys partition, recompute_ratio"),
        ('{}', ": has no 'partition', a list of blocks per stage, e.g. [12, 13, 13, 11]"),
        ('{"partitions": [1]}', ": partitions = [1] is not a known key; did you mean 'partition'?"),
        ('{"partition": [1], "x": 2}', ": x = 2 is not a known key; known here: partition, recompute_ratio"),
        ('{"partition": [12, 0]}', ": partition = [12, 0] is not a list with a whole number of at least 1 per stage"),
        ('{"partition": []}', ": partition = [] is not a list with a whole number of at least 1 per stage"),
        ('{"partition": [true]}', ": partition = [True] is not a list with a whole number of at least 1 per stage"),
        ('{"partition": [1], "recompute_ratio": [30]}',
         ": recompute_ratio = [30] is not a list with a number from 0 to 1 per stage"),
        ('{"partition": [1], "recompute_ratio": 0.5}',
         ": recompute_ratio = 0.5 is not a list with a number from 0 to 1 per stage"),
        ('{"partition": [1, 2], "recompute_ratio": [0]}',
         ": recompute_ratio has 1 entries and partition has 2; give one per stage"),
    ],
)  # fmt: skip
def test_partition_file_wording(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_partition_file(path)
    assert str(error.value) == f"{path}{message}"


@pytest.mark.parametrize(
    ("text", "maps"),
    [
        ('{"module_to_stage_map": [0, 1, 2, 2]}', StageMaps(3, None, {})),
        ('{"module_to_stage_map": [0, 1]}', StageMaps(2, None, {})),
        ('{"module_to_stage_map": [0, 0]}', StageMaps(1, None, {})),
        ('{"stage_to_rank_map": {"0": [0], "1": [1]}}', StageMaps(2, 2, {})),
        ('{"stage_to_rank_map": {"0": [0], "1": [1], "2": [0], "3": [1]}}', StageMaps(4, 2, {})),
        ('{"stage_to_depth_map": {"0": 1, "1": 0}}', StageMaps(None, None, {"stage_to_depth_map": {"0": 1, "1": 0}})),
        ('{"module_to_stage_map": null, "mp_size": 1}', StageMaps(None, None, {})),
    ],
)
def test_stage_maps(tmp_path: Path, text: str, maps: StageMaps) -> None:
    assert read_stage_maps(written(tmp_path, text)) == maps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stage_to_rank_map": {"0": [0, 1], "1": [2]}}',
         "stage_to_rank_map gives stage 0 the ranks [0, 1]: replicated stages are not supported yet; give each stage "
         "one rank"),
        ('{"stage_to_rank_map": {"0": [1], "1": [0]}}',
         "stage_to_rank_map puts stage 0 on rank 1; stages lie on ranks in order, here [0, 1]; reorder 'machines' to "
         "choose devices"),
        ('{"stage_to_rank_map": {"0": [0], "1": [2]}}',
         "stage_to_rank_map puts stage 1 on rank 2; stages lie on ranks in order, here [0, 1]; reorder 'machines' to "
         "choose devices"),
        ('{"stage_to_rank_map": {"0": [0], "1": [1], "2": [1]}}',
         "stage_to_rank_map puts stage 2 on rank 1; stages lie on ranks in order, here [0, 1, 2]; reorder "
         "'machines' to choose devices"),
        ('{"stage_to_rank_map": {"0": [0], "2": [1]}}',
         "stage_to_rank_map = {'0': [0], '2': [1]} does not give every stage from 0 up its ranks, e.g. "
         '{"0": [0], "1": [1]}'),
        ('{"stage_to_rank_map": {"0": 0}}',
         """stage_to_rank_map = {'0': 0} does not give every stage from 0 up its ranks, e.g. {"0": [0], "1": [1]}"""),
        ('{"module_to_stage_map": [0, 0, 1, 1, 1]}',
         "module_to_stage_map = [0, 0, 1, 1, 1] does not count stages up, one per entry of the partition and the "
         "last again for the loss; write [0, 1, 1] and join what shares a stage in the partition"),
        ('{"module_to_stage_map": [1, 2]}',
         "module_to_stage_map = [1, 2] does not count stages up, one per entry of the partition and the last again "
         "for the loss; write [0, 1, 2, 2] and join what shares a stage in the partition"),
        ('{"module_to_stage_map": "x"}', "module_to_stage_map = 'x' is not a list of stages, e.g. [0, 1, 2, 3, 3]"),
        ('{"module_to_stage_map": [-1]}', "module_to_stage_map = [-1] is not a list of stages, e.g. [0, 1, 2, 3, 3]"),
        ('{"module_to_stage_map": [0, 1, 1000000000000]}',
         "module_to_stage_map = [0, 1, 1000000000000] does not count stages up, one per entry of the partition and the "
         "last again for the loss; write [0, 1, 2, 3, 3] and join what shares a stage in the partition"),
        ('{"module_to_stage_map": [0, 1, 1], "stage_to_rank_map": {"0": [0]}}',
         "module_to_stage_map has 2 stages and stage_to_rank_map has 1"),
        ('{"mp_size": 2}', "mp_size = 2: tensor parallelism is not supported yet; use 1"),
        ('{"stage_to_rank": {}}', "stage_to_rank = {} is not a known key; did you mean 'stage_to_rank_map'?"),
    ],
)  # fmt: skip
def test_stage_maps_wording(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_stage_maps(path)
    assert str(error.value) == f"{path}: {message}"
