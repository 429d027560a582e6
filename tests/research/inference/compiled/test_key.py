"""A tag is true of one content and one key, and a key that others may know is refused."""

import hmac
import os

import pytest

from layers.config import ConfigError
from research.inference.compiled.key import is_tag, key_folder, tag


def test_a_tag_is_that_of_one_content_and_one_key(home, monkeypatch, tmp_path):
    made = tag(b"a")
    assert (home.stat().st_mode & 0o777, (home / "key").stat().st_mode & 0o777) == (0o700, 0o600)
    expected = hmac.new((home / "key").read_bytes(), b"a", "sha256").hexdigest()
    assert made == expected == tag(b"a") and len((home / "key").read_bytes()) == 32
    assert is_tag(made, b"a")
    assert not is_tag(made, b"b") and not is_tag(made[:-1], b"a") and not is_tag("é", b"a")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
    assert not is_tag(made, b"a") and not (tmp_path / "other").exists()
    assert tag(b"a") != made and not is_tag(made, b"a")


def test_tags_are_compared_in_constant_time(monkeypatch):
    made, compared, compare = tag(b"a"), [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *a: compared.append(a) or compare(*a))
    assert is_tag(made, b"a") and len(compared) == 1
    monkeypatch.setattr(hmac, "compare_digest", lambda *a: False)
    assert not is_tag(made, b"a")


def test_the_key_is_whole_and_secret_before_it_has_its_name(home, monkeypatch):
    link, seen = os.link, []

    def linked(source, target, **folders):
        status = os.stat(source, dir_fd=folders["src_dir_fd"])
        seen.append((status.st_size, status.st_mode & 0o777, (home / target).exists()))
        return link(source, target, **folders)

    monkeypatch.setattr(os, "link", linked)
    tag(b"a")
    assert seen == [(32, 0o600, False)]
    assert os.listdir(home) == ["key"]


def test_of_two_processes_that_make_a_key_the_first_one_s_is_used(home, monkeypatch):
    link = os.link

    def linked(source, target, **folders):
        (home / target).write_bytes(b"k" * 32)  # of the other process
        (home / target).chmod(0o600)
        return link(source, target, **folders)

    monkeypatch.setattr(os, "link", linked)
    assert tag(b"a") == hmac.new(b"k" * 32, b"a", "sha256").hexdigest()
    assert os.listdir(home) == ["key"]


def as_link(home):
    (home / "key").rename(home.parent / "elsewhere")
    (home / "key").symlink_to(home.parent / "elsewhere")


def folder_as_link(home):
    home.rename(home.parent / "elsewhere")
    home.symlink_to(home.parent / "elsewhere")


def as_pipe(home):
    (home / "key").unlink()
    os.mkfifo(home / "key", 0o600)


def as_folder(home):
    (home / "key").unlink()
    (home / "key").mkdir(0o700)


def folder_as_file(home):
    home.rename(home.parent / "elsewhere")
    home.write_text("")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (as_link, r"file='.*/ablate/key': must be a file, not a link"),
        (folder_as_link, r"folder='.*/ablate': must be a folder, not a link or file"),
        (folder_as_file, r"folder='.*/ablate': must be a folder, not a link or file"),
        (as_pipe, r"file='.*/ablate/key': must be a file"),
        (as_folder, r"file='.*/ablate/key': must be a file"),
        (lambda home: (home / "key").chmod(0o640), r"/key': has mode 640, so others may have read"),
        (lambda home: (home / "key").chmod(0o604), r"/key': has mode 604, so others may have read"),
        (lambda home: (home / "key").chmod(0o602), r"/key': has mode 602, so others may have read"),
        (lambda home: home.chmod(0o770), r"/ablate': has mode 770, so others may have written"),
        (lambda home: (home / "key").write_bytes(b"k" * 31), r"/key': must hold 32 bytes: delete"),
        (lambda home: (home / "key").write_bytes(b"k" * 33), r"/key': must hold 32 bytes: delete"),
    ],
)
def test_a_key_that_others_may_know_is_refused_by_name(home, spoil, message):
    made = tag(b"a")
    spoil(home)
    for use in (lambda: tag(b"a"), lambda: is_tag(made, b"a")):
        with pytest.raises(ConfigError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_key_of_another_user_is_refused(home, monkeypatch):
    tag(b"a")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match=rf"ablate': must belong to user {os.getuid() + 1}, bel"):
        tag(b"a")


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    with pytest.raises(ConfigError, match="XDG_DATA_HOME='data': must be an absolute path"):
        tag(b"a")
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_folder() == tmp_path / ".local/share/ablate"
