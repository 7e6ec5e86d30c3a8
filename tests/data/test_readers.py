"""Reading rows from real files, directories in the hub's layout, and a hub that cannot be reached."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mopo_cli.base.errors import UserError
from mopo_cli.data.readers import is_local, read_rows, split_names

ROWS = [{"a": 1}, {"a": "zwei", "b": [None, 0.5]}, {"a": None}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def values(path: str, **options: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path, **options)]


def error(path: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(path, **options))
    return str(caught.value)


class TestFiles:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
    def test_json_lines_with_their_line_numbers(self, tmp_path: Path, name: str):
        path = write(tmp_path / name, LINES)
        assert list(read_rows(path)) == [(f"{path}:{i}", row) for i, row in enumerate(ROWS, start=1)]

    @pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
    def test_a_json_list_with_its_indices(self, tmp_path: Path, name: str):
        path = write(tmp_path / name, "\n " + json.dumps(ROWS, indent=2))
        assert list(read_rows(path)) == [(f"{path}[{i}]", row) for i, row in enumerate(ROWS)]

    def test_blank_lines_and_a_byte_order_mark_are_passed_over(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", '\ufeff{"a": "ü"}\r\n\n{"a": 2}')
        assert list(read_rows(path)) == [(f"{path}:1", {"a": "ü"}), (f"{path}:3", {"a": 2})]
        assert values(write(tmp_path / "rows.json", '\ufeff[{"a": 1}]')) == [{"a": 1}]

    def test_parquet_in_batches(self, tmp_path: Path):
        rows = [{"prompt": f"Q{i}", "scores": {"x": [1.0, None]}, "none": None} for i in range(2500)]
        path = str(tmp_path / "rows.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
        read = list(read_rows(path))
        assert [row for _, row in read] == rows
        assert read[-1][0] == f"{path}:2500"

    def test_json_lines_are_streamed(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", LINES + "not JSON\n")
        stream = read_rows(path)
        assert [next(stream)[1] for _ in ROWS] == ROWS  # the bad fourth line is not reached yet

    def test_a_split_means_nothing_for_a_file(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", LINES)
        assert values(path, split="train") == ROWS
        assert split_names(path) == ()

    def test_a_home_directory_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write(tmp_path / "rows.jsonl", LINES)
        assert values("~/rows.jsonl") == ROWS


class TestFileErrors:
    def test_missing_file(self, tmp_path: Path):
        path = str(tmp_path / "none.jsonl")
        with pytest.raises(UserError, match="no such file or directory") as caught:
            read_rows(path)  # at once, not at the first row
        assert path in str(caught.value)

    def test_a_line_that_is_no_json_names_file_line_and_column(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": }\n')
        assert error(path).startswith(f"{path}:2: not JSON at column 7 (Expecting value)")
        path = write(tmp_path / "cut.jsonl", '{"a": 1}\n{"a":\n')
        assert error(path).startswith(f"{path}:2: not JSON at column 6")

    def test_a_list_that_is_no_json_names_file_line_and_column(self, tmp_path: Path):
        path = write(tmp_path / "rows.json", '[{"a": 1},\n {"a" 2}]')
        assert error(path).startswith(f"{path}:2: not JSON at column 7")

    def test_a_row_that_is_no_object(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", '{"a": 1}\n[1, 2]\n')
        assert error(path) == f"{path}:2: expected a JSON object, found [1, 2]"
        path = write(tmp_path / "rows.json", '[{"a": 1}, "x"]')
        assert error(path) == f'{path}[1]: expected a JSON object, found "x"'

    def test_text_that_is_not_utf_8(self, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n')
        assert error(path).startswith(f"{path}:2: not UTF-8 at byte 8")

    @pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
    def test_a_torn_gzip_file(self, tmp_path: Path, name: str):
        path = Path(write(tmp_path / name, LINES * 200))
        path.write_bytes(path.read_bytes()[:-20])
        message = error(str(path))
        assert message.startswith(f"{path}: the gzip file is damaged or cut short after line ")
        assert "download it again" in message

    def test_a_corrupt_gzip_file(self, tmp_path: Path):
        path = Path(write(tmp_path / "rows.jsonl.gz", LINES * 200))
        data = bytearray(path.read_bytes())
        data[-8] ^= 0xFF  # in the check sum
        path.write_bytes(bytes(data))
        assert "the gzip file is damaged or cut short after line 600 (CRC check failed" in error(str(path))

    def test_a_gz_file_that_is_not_gzipped(self, tmp_path: Path):
        path = tmp_path / "rows.jsonl.gz"
        path.write_text(LINES)
        assert "Not a gzipped file" in error(str(path))

    def test_a_torn_parquet_file(self, tmp_path: Path):
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS[:1]), path)
        path.write_bytes(path.read_bytes()[:-10])
        assert error(str(path)).startswith(f"{path}: not a readable Parquet file, after row 0")

    def test_an_unknown_kind_of_file(self, tmp_path: Path):
        path = write(tmp_path / "rows.csv", "a,b\n1,2\n")
        assert "cannot read this kind of file; allowed: .jsonl" in error(path)


class TestDirectories:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        write(tmp_path / "helpful-base" / "train.jsonl.gz", LINES)
        write(tmp_path / "helpful-base" / "test.jsonl.gz", '{"a": 9}\n')
        write(tmp_path / "harmless-base" / "train.jsonl.gz", '{"a": 7}\n')
        return tmp_path

    def test_splits_inside_a_data_dir(self, root: Path):
        assert split_names(str(root), data_dir="helpful-base") == ("train", "test")
        rows = list(read_rows(str(root), "test", data_dir="helpful-base"))
        assert rows == [(f"{root}/helpful-base/test.jsonl.gz:1", {"a": 9})]
        assert values(str(root), split="train", data_dir="helpful-base") == ROWS

    def test_the_only_split_needs_no_name(self, root: Path):
        assert values(str(root), data_dir="harmless-base") == [{"a": 7}]

    def test_a_data_dir_may_be_a_file(self, root: Path):
        write(root / "extra.jsonl", LINES)
        assert values(str(root), data_dir="extra.jsonl") == ROWS
        assert split_names(str(root), data_dir="extra.jsonl") == ()

    def test_parquet_shards_under_data(self, tmp_path: Path):
        (tmp_path / "data").mkdir()
        for shard in (0, 1):
            pq.write_table(pa.table({"a": [shard]}), tmp_path / "data" / f"train-0000{shard}-of-00002.parquet")
        assert values(str(tmp_path), split="train") == [{"a": 0}, {"a": 1}]

    def test_configs_of_a_data_set_card(self, tmp_path: Path):
        configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two"))
        write(tmp_path / "README.md", f"---\nconfigs:\n{configs}---\n")
        write(tmp_path / "one.jsonl", '{"a": 1}\n')
        write(tmp_path / "two.jsonl", '{"a": 2}\n')
        assert values(str(tmp_path), name="two") == [{"a": 2}]
        assert "BuilderConfig 'three' not found" in error(str(tmp_path), name="three")

    def test_errors_name_what_was_found(self, root: Path):
        assert "has no split 'validation'; found: train, test" in error(
            str(root), split="validation", data_dir="helpful-base"
        )
        assert "holds no 'helpful-online'; found: harmless-base, helpful-base" in error(
            str(root), data_dir="helpful-online"
        )
        (root / "empty").mkdir()
        assert "not a data set in the hub's layout" in error(str(root / "empty"))

    def test_a_torn_gzip_file_inside(self, root: Path):
        path = root / "harmless-base" / "train.jsonl.gz"
        path.write_bytes(path.read_bytes()[:-12])
        message = error(str(root), split="train", data_dir="harmless-base")
        assert message.startswith(f"{path}: the gzip file is damaged or cut short")

    def test_a_line_that_is_no_json_inside(self, root: Path):
        path = write(root / "harmless-base" / "train.jsonl.gz", '{"a": 1}\n{"a":\n')
        assert error(str(root), split="train", data_dir="harmless-base").startswith(f"{path}:2: not JSON")

    def test_columns_may_change_their_type_between_files(self, tmp_path: Path):
        write(tmp_path / "one.jsonl", '{"a": null}\n{"a": 1}\n')
        write(tmp_path / "two.jsonl", '{"a": "x", "b": [1]}\n')
        assert values(str(tmp_path), split="train") == [{"a": None}, {"a": 1}, {"a": "x", "b": [1]}]

    def test_other_kinds_of_files_go_through_datasets(self, tmp_path: Path):
        write(tmp_path / "train.csv", "prompt,chosen\nQ,a\nR,b\n")
        read = list(read_rows(str(tmp_path)))
        assert read[0] == (f"{tmp_path} (train):1", {"prompt": "Q", "chosen": "a"})
        write(tmp_path / "train.csv", "prompt,chosen\nQ,a\nR,b,c,d\n")
        assert f"{tmp_path} (train): cannot be read after row" in error(str(tmp_path))


class TestHub:
    @pytest.mark.parametrize(
        ("path", "local"),
        [
            ("openbmb/UltraFeedback", False),
            ("squad", False),
            ("rows.jsonl", True),
            ("data/rows.parquet", True),
            ("./data", True),
            ("../data", True),
            ("/data/x", True),
            ("~/data", True),
            ("a/b/c", True),
            ("some where/x", True),
        ],
    )
    def test_what_looks_like_a_path(self, path: str, local: bool):
        assert is_local(path) is local

    def test_an_existing_directory_is_local(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        assert not is_local("owner/data")
        (tmp_path / "owner" / "data").mkdir(parents=True)
        assert is_local("owner/data")

    def test_an_unreachable_id_says_how_to_work_offline(self):
        message = error("no-such-owner-0/no-such-data", revision="refs/convert/parquet")
        assert message.startswith("no-such-owner-0/no-such-data: ")
        command = "hf download no-such-owner-0/no-such-data --repo-type dataset --revision refs/convert/parquet"
        assert f"{command} --local-dir DIR" in message
        assert "dataset.path=DIR" in message
        assert "HF_HUB_OFFLINE=1" in message

    def test_a_filled_cache_is_enough(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        cached, commit = tmp_path / "datasets--owner--data", "0" * 40
        write(cached / "refs" / "main", commit)
        write(cached / "snapshots" / commit / "part" / "train.jsonl", '{"a": 1}\n')
        assert list(read_rows("owner/data", "train", data_dir="part")) == [
            (f"{cached}/snapshots/{commit}/part/train.jsonl:1", {"a": 1})
        ]
        assert split_names("owner/data", data_dir="part") == ("train",)
