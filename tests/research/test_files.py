"""Files and folders that are whole or absent, and errors that name them."""

import json
import os

import pytest

from layers.config import ConfigError
from research.files import new_directory, read_json, write_atomically, write_json, write_text


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
