"""Files and folders that are whole or absent, and errors that name them."""

import json
import os

import pytest

from layers.config import ConfigError
from research.files import (
    mismatch,
    new_directory,
    read_fields,
    read_json,
    read_lines,
    remove_temporaries,
    write_atomically,
    write_json,
    write_text,
)


@pytest.fixture
def synced(monkeypatch):
    """The names of what is synced, and of what is renamed, in order."""
    done = []
    replace = os.replace

    def record(name):
        def call(opened):
            done.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{opened}"))))

        return call

    def renamed(source, target):
        done.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record("sync"))
    monkeypatch.setattr(os, "replace", renamed)
    return done


def test_a_file_is_synced_before_it_has_its_name_and_its_folder_after(tmp_path, synced):
    write_text(tmp_path / "new" / "a.txt", "whole")
    assert synced == [
        ("sync", f".a.{os.getpid()}.txt"), ("rename", "a.txt"), ("sync", "new"),
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_a_write_that_breaks_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def broken(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match=f"disk full: '{path}'"):
        write_atomically(path, broken)
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_system_names_the_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path}/file'$"):
        write_text(tmp_path / "file" / "a.txt", "")

    def full(temporary):
        with open("/dev/full", "w") as file:
            file.write("more than fits")

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/b.txt'$"):
        write_atomically(tmp_path / "b.txt", full)


def test_damaged_json_names_its_file(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"numbers": [1, float("nan")], "name": "ü"})
    assert read_json(path) == {"numbers": [1, "nan"], "name": "ü"}
    whole = path.read_bytes()
    for damaged in (whole[:-4], b"", whole.replace("ü".encode(), b"\xff")):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"^file='{path}': not JSON: ") as caught:
            read_json(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="absent.json"):
        read_json(tmp_path / "absent.json")


def test_a_folder_appears_whole_or_not_at_all(tmp_path, synced):
    place = tmp_path / "model"
    with pytest.raises(KeyError), new_directory(place) as fresh:
        (fresh / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == [] and synced == []
    with new_directory(place) as fresh:
        (fresh / "part").mkdir()
        (fresh / "part" / "a").write_text("whole")
        assert not place.exists()
    assert (place / "part/a").read_text() == "whole" and list(tmp_path.iterdir()) == [place]
    names = [("sync", "part"), ("sync", "a"), ("sync", fresh.name)]
    assert sorted(synced[:3]) == sorted(names)
    assert synced[3:] == [("rename", "model"), ("sync", tmp_path.name)]
    with pytest.raises(ConfigError, match="must be absent or empty"), new_directory(place):
        pytest.fail("was begun")
    assert (place / "part/a").read_text() == "whole"


def test_a_folder_that_could_not_be_filled_is_named(tmp_path):
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/model'$"):
        with new_directory(tmp_path / "model"), open("/dev/full", "w") as file:
            file.write("more than fits")
    assert list(tmp_path.iterdir()) == []


FORM = {
    "name": str,
    "seeds": [int],
    "status": {"good", "bad"},
    "low": (float, None),
    "arms": {str: {"x": int}},
}
VALID = {"name": "a", "seeds": [0], "status": "good", "low": None, "arms": {"b": {"x": 1, "y": 2}}}


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, ""),
        ({"more": 1, "low": 1.0, "seeds": []}, ""),
        ({"name": 1}, "name must be str"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"seeds": [0, "1"]}, "seeds[1] must be int"),
        ({"seeds": [True]}, "seeds[0] must be int"),
        ({"status": "fine"}, "status must be one of bad, good"),
        ({"status": ["good"]}, "status must be one of bad, good"),
        ({"low": "x"}, "low must be float or NoneType"),
        ({"arms": []}, "arms must be an object"),
        ({"arms": {"b": 3}}, "arms.b must be an object"),
        ({"arms": {"b": {"y": 3}}}, "arms.b.x is missing"),
    ],
)
def test_the_form_of_a_file(tmp_path, change, fault):
    assert mismatch(VALID | change, FORM) == fault
    path = tmp_path / "a.json"
    write_json(path, VALID | change)
    if fault:
        with pytest.raises(ConfigError) as caught:
            read_fields(path, FORM, "delete it")
        assert str(caught.value) == f"file={str(path)!r}: {fault}; delete it"
    else:
        assert read_fields(path, FORM, "delete it") == VALID | change
    assert mismatch([], FORM) == "the content must be an object"
    assert mismatch({}, FORM) == "name is missing"
    assert mismatch({"a": 10**400}, {"a": (int, float)}) == "a must be of at most 64 bits"
    assert mismatch({"a\nb": "x"}, {str: int}) == "'a\\nb' must be int"


def test_a_damaged_line_is_named_and_an_incomplete_one_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x": 0.5}\n{"st')
    assert read_lines(path, {"step": int}, "") == [{"step": 1}, {"step": 2, "x": 0.5}]
    for damage in (b"[1]", b'{"step": "1"}', b"{", b"\xff"):
        path.write_bytes(b'{"step": 1}\n' + damage + b"\n")
        with pytest.raises(ConfigError, match=f"^file='{path}:2': .*; delete it$"):
            read_lines(path, {"step": int}, "delete it")


def test_what_is_being_written_can_be_removed(tmp_path):
    def end_here(temporary):
        temporary.write_text("half")
        remove_temporaries()
        assert not list(tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", end_here)
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "new") as fresh:
        end_here(fresh / "half")
    write_text(tmp_path / "whole", "")
    remove_temporaries()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
