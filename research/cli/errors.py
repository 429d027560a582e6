"""Errors as one line that says what to do."""

import errno
import os

# what the user can do about an error of the system
_REMEDIES = {
    errno.EACCES: "use a path that this user may read and write",
    errno.EDQUOT: "free space; then the same command continues",
    errno.EEXIST: "remove it or choose another path",
    errno.EISDIR: "a file is required: remove the folder or choose another path",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "create it or choose another path",
    errno.ENOMEM: "free memory or choose smaller sizes",
    errno.ENOSPC: "free space; then the same command continues",
    errno.ENOTDIR: "a part of the path is a file: remove it or choose another path",
    errno.ENOTEMPTY: "remove what it holds or choose another path",
    errno.EPERM: "use a path that this user may read and write",
    errno.EROFS: "choose a path on a disk that can be written",
}
_REMEDY = "check the disk or choose another path"


def line(error: BaseException) -> str:
    """The first line of the message of ``error``; for an error of the system also what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = os.strerror(error.errno)
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        remedy = _REMEDIES.get(error.errno, _REMEDY)
        return f"{': '.join((' → '.join(paths), reason) if paths else (reason,))}: {remedy}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
