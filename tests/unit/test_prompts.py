"""Prompts by index, and prompt files of every kind of brokenness. About 3 s."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.config import AdditionData, CountdownData, FileData
from orchestrator.errors import UserError
from orchestrator.prompts import Message, build_source, read_prompts
from rewards.graders import EXACT_CHECKERS

GOOD: list[dict[str, Any]] = [{"prompt": f"{i}+{i}:", "reference": str(2 * i), "level": i} for i in range(5)]
CHAT: dict[str, Any] = {
    "id": "chat",
    "messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}],
    "reference": "2",
}


def jsonl(folder: Path, rows: Sequence[Any], name: str = "prompts.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(folder: Path, rows: Sequence[dict[str, Any]], name: str = "prompts.parquet") -> str:
    path = folder / name
    columns = sorted({column for row in rows for column in row})
    pq.write_table(pa.table({column: [row.get(column) for row in rows] for column in columns}), path)
    return str(path)


def section(path: str, **settings: Any) -> FileData:
    return FileData.model_validate({"path": path, "task": "addition", **settings})


def complaint(path: str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        build_source(section(path, **settings), seed=0)
    said = str(caught.value)
    assert "\n" not in said
    return said


# ---- generated prompts


@pytest.mark.parametrize("data", [AdditionData(), AdditionData(max_digits=1), CountdownData()])
def test_no_generated_prompt_is_both_trained_on_and_held_out(data: AdditionData | CountdownData) -> None:
    source = build_source(data, seed=0)
    trained = {prompt.messages[0].content for prompt in source.training(0, 2000)}
    held_out = [prompt.messages[0].content for prompt in source.held_out(100)]
    assert trained.isdisjoint(held_out)
    assert len(set(held_out)) == len(held_out)
    assert len(held_out) == 100 or data == AdditionData(max_digits=1)


@pytest.mark.parametrize("data", [AdditionData(), CountdownData()])
def test_a_generated_prompt_follows_from_seed_and_index_alone(data: AdditionData | CountdownData) -> None:
    once, again, other = (build_source(data, seed=seed) for seed in (0, 0, 1))
    assert once.training(0, 10) + once.training(10, 10) == again.training(0, 20)
    assert again.training(7, 1) == once.training(0, 20)[7:8]
    assert once.held_out(20) == again.held_out(20)
    assert {p.messages for p in once.training(0, 20)} != {p.messages for p in other.training(0, 20)}
    assert len({prompt.prompt_id for prompt in once.training(0, 500) + once.held_out(100)}) == 600
    assert list(once.everything()) == []


@pytest.mark.parametrize("data", [AdditionData(), CountdownData()])
def test_the_references_of_generated_prompts_are_ones_that_their_grader_takes(
    data: AdditionData | CountdownData,
) -> None:
    for prompt in build_source(data, seed=0).training(0, 50):
        assert EXACT_CHECKERS[prompt.task]("", prompt.reference).status == "unparsable"


# ---- prompt files


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_file_of_prompts_is_read_with_its_other_columns_ignored(tmp_path: Path, write: Any) -> None:
    prompts = read_prompts("data.path", path := write(tmp_path, GOOD), section(path))
    assert [prompt.text for prompt in prompts] == [row["prompt"] for row in GOOD]
    assert [prompt.reference for prompt in prompts] == [row["reference"] for row in GOOD]
    assert [prompt.prompt_id for prompt in prompts] == ["0", "1", "2", "3", "4"]
    assert {(prompt.task, prompt.messages) for prompt in prompts} == {("addition", ())}


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_a_chat_keeps_its_turns_and_a_system_prompt_goes_before_them(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path, [CHAT, {"id": None, **GOOD[1]}])
    chat, text = read_prompts("data.path", path, section(path, system_prompt="Be brief."))
    assert chat.prompt_id == "chat"
    assert [turn.content for turn in chat.messages] == ["Be brief.", "Add.", "1+1?"]
    assert text.prompt_id == "1"
    assert text.messages == (Message(role="system", content="Be brief."), Message(role="user", content="1+1:"))


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in GOOD) + b"\r\n \r\n")
    assert [prompt.text for prompt in read_prompts("data.path", str(path), section(str(path)))] == [
        row["prompt"] for row in GOOD
    ]


def test_each_epoch_has_ids_and_an_order_of_its_own_that_a_resumed_run_finds_again(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+0:", "reference": str(i), "id": f"row-{i}"} for i in range(20)]
    data = section(jsonl(tmp_path, rows))
    epochs = [build_source(data, seed=0).training(20 * epoch, 20) for epoch in range(3)]
    texts = [[prompt.text for prompt in epoch] for epoch in epochs]
    assert all(sorted(text) == sorted(row["prompt"] for row in rows) for text in texts)
    assert len({tuple(text) for text in texts}) == 3
    assert len({prompt.prompt_id for epoch in epochs for prompt in epoch}) == 60
    source = build_source(data, seed=0)
    assert [prompt for start in range(0, 60, 7) for prompt in source.training(start, min(7, 60 - start))] == [
        prompt for epoch in epochs for prompt in epoch
    ]
    assert build_source(data, seed=1).training(0, 20) != epochs[0]


def test_without_shuffling_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    source = build_source(section(jsonl(tmp_path, GOOD), shuffle=False), seed=0)
    assert [prompt.text for prompt in source.training(3, 4)] == ["3+3:", "4+4:", "0+0:", "1+1:"]


def test_a_large_file_is_not_shuffled_anew_for_each_prompt(tmp_path: Path) -> None:
    source = build_source(section(jsonl(tmp_path, [{"prompt": str(i), "reference": "1"} for i in range(20_000)])), 0)
    assert len({prompt.text for prompt in source.training(0, 20_000)}) == 20_000


def test_held_out_prompts_are_the_first_rows_of_their_own_file(tmp_path: Path) -> None:
    data = section(jsonl(tmp_path, GOOD), held_out_path=parquet(tmp_path, [CHAT]))
    source = build_source(data, seed=0)
    assert [prompt.prompt_id for prompt in source.held_out(8)] == ["chat"]
    assert len(list(source.everything())) == 6
    assert build_source(section(data.path), seed=0).held_out(8) == []


# ---- broken prompt files


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "a prompt must be an object, got list"),
        ({"prompt": "1+1:"}, "`reference` must be a non-empty string, got null"),
        ({"prompt": "1+1:", "reference": 2}, "`reference` must be a non-empty string, got 2"),
        ({"prompt": "1+1:", "reference": ""}, "`reference` must be a non-empty string, got ''"),
        ({"prompt": "1+1:", "reference": "two"}, "the reference of an addition must be an integer, got 'two'"),
        ({"reference": "2"}, "exactly one of `prompt` and `messages` must be given, got neither"),
        ({**CHAT, "prompt": "1+1:"}, "exactly one of `prompt` and `messages` must be given, got both"),
        ({"prompt": 3, "reference": "2"}, "`prompt` must be a non-empty string, got 3"),
        ({"prompt": "", "reference": "2"}, "`prompt` must be a non-empty string, got ''"),
        ({"prompt": "\ud800", "reference": "2"}, "text must be valid Unicode, got half a surrogate pair"),
        ({**CHAT, "messages": []}, "`messages` must be a list of at least one message, got []"),
        ({**CHAT, "messages": 3}, "`messages` must be a list of at least one message, got 3"),
        ({**CHAT, "messages": "hi"}, "`messages` must be a list of at least one message, got 'hi'"),
        ({**CHAT, "messages": ["hi"]}, "each of `messages` must have a `role` and a `content`, both strings, got 'hi'"),
        ({**CHAT, "messages": [{"role": "user"}]}, "each of `messages` must have a `role` and a `content`, both"),
        ({**CHAT, "messages": [{"role": "user", "content": None}]}, "both strings, got {'content': None, 'ro"),
        ({**CHAT, "id": 1.5}, "`id` must be a string or a whole number, got 1.5"),
        ({**CHAT, "id": "0"}, "`id` must differ from every other, got '0', as in"),
    ],
)  # fmt: skip
def test_a_row_of_the_wrong_form_is_refused_by_its_line(tmp_path: Path, row: Any, said: str) -> None:
    path = jsonl(tmp_path, [GOOD[0], row, GOOD[1]])
    assert complaint(path).startswith(f"{path}, line 2: ")
    assert said in complaint(path)


def test_a_reference_of_a_countdown_has_its_form_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD)
    assert "line 1: the reference of a countdown must look like" in complaint(path, task="countdown")


def test_the_prompt_itself_is_not_spread_over_the_terminal(tmp_path: Path) -> None:
    assert len(complaint(jsonl(tmp_path, [{"prompt": ["secret " * 1000], "reference": "2"}]))) < 300


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "1+1:", "reference": "2"}\n{"prompt": "2+2:", "refe', "line 2: a prompt must be one JSON object"),
        (b'{"prompt": "caf\xe9", "reference": "2"}\n', "line 1: a prompt must be one JSON object per line, got: 'ut"),
        ('{"prompt": "1+1:", "reference": "2"}\n'.encode("utf-16"), "line 1: a prompt must be one JSON object per"),
        (b"prompt,reference\n1+1:,2\n", "line 1: a prompt must be one JSON object per line"),
        (b"[" * 100_000 + b"\n", "line 1: a prompt must be one JSON object per line, got: maximum recursion"),
        (b"\x00" * 100 + b"\n", "line 1: a prompt must be one JSON object per line"),
        (b"", "data.path must hold at least one prompt, got none in"),
        (b"\n \n", "data.path must hold at least one prompt, got none in"),
    ],
)  # fmt: skip
def test_a_half_broken_jsonl_file_is_refused_by_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert said in complaint(str(path))


def damaged(path: str, *, keep: int, poke: int | None = None) -> str:
    """Cut a file after `keep` bytes from the end (or not at all, if 0), and overwrite 64 bytes from `poke` on."""
    content = bytearray(Path(path).read_bytes())
    if poke is not None:
        content[poke : poke + 64] = b"\xff" * 64
    Path(path).write_bytes(content[: len(content) - keep])
    return path


@pytest.mark.parametrize(("keep", "poke"), [(1, None), (100, None), (-1, 0), (0, 4)])
def test_a_half_broken_parquet_file_is_refused(tmp_path: Path, keep: int, poke: int | None) -> None:
    rows = [{"prompt": f"{i}+{i}:" * 20, "reference": str(2 * i)} for i in range(500)]
    path = parquet(tmp_path, rows)
    size = Path(path).stat().st_size
    said = complaint(damaged(path, keep=size if keep == -1 else keep, poke=poke))
    assert str(path) in said
    assert "must be a whole Parquet file, got" in said or "must be a readable file, got" in said


def test_a_parquet_file_of_the_wrong_types_is_refused_by_its_row(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1:", "reference": 2}]
    assert "row 1: `reference` must be a non-empty string, got 2" in complaint(parquet(tmp_path, rows))
    assert "row 1: exactly one of" in complaint(parquet(tmp_path, [{"question": "1+1:", "reference": "2"}]))
    assert "data.path must hold at least one prompt" in complaint(parquet(tmp_path, []))


def test_columns_that_python_has_no_value_for_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    far = pa.array([2**62], pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"prompt": ["1+1:"], "reference": ["2"], "seen": far.cast(pa.timestamp("us"), safe=False)}),
                   path)  # fmt: skip
    assert len(read_prompts("data.path", str(path), section(str(path)))) == 1


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "folder.jsonl", "folder.parquet"])
def test_what_is_no_readable_file_is_refused_by_its_setting(tmp_path: Path, name: str) -> None:
    for folder in ("folder.jsonl", "folder.parquet"):
        (tmp_path / folder).mkdir()
    assert complaint(str(tmp_path / name)).startswith("data.path must be a readable file, got ")
    good = jsonl(tmp_path, GOOD)
    assert complaint(good, held_out_path=str(tmp_path / name)).startswith("data.held_out_path must be a readable file")


@pytest.mark.parametrize("name", ["prompts.csv", "prompts", "prompts.jsonl.gz", ""])
def test_other_kinds_of_files_are_refused(name: str) -> None:
    assert complaint(name) == f"data.path must name a .jsonl or .parquet file, got {name!r}"
