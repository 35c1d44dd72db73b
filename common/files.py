"""Files that are either whole or absent, rows of JSON, and one clear message when a disk refuses a write."""
import contextlib
import errno
import io
import json
import os
from collections.abc import Callable

from common.config import UserError

ADVICE = {errno.ENOSPC: "the disk is full; free some space", errno.EROFS: "the disk is read-only",
          errno.EDQUOT: "the quota is used up; free some space", errno.ENOTDIR: "its folder is a file",
          errno.EFBIG: "the file would be larger than is allowed here", errno.EEXIST: "that is a file"}


class DiskError(UserError):
    def __init__(self, path: str, error: OSError):
        reason = ADVICE.get(error.errno, error.strerror or str(error))
        super().__init__(f"could not write {path}: {reason}\nwhat was saved before is intact: fix this and "
                         "repeat the command, or write elsewhere with --out_dir (prepare_data: --data_dir)")


@contextlib.contextmanager
def writing(path: str):
    """Turn an OSError inside into a DiskError that names `path`."""
    try:
        yield
    except OSError as e:
        raise DiskError(path, e) from e


class WatchedFile(io.FileIO):
    """Keeps the error of a failed write: torch.save raises a RuntimeError that does not mention it."""
    error = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as e:
            self.error = e
            raise


def write_atomically(path: str, write: Callable) -> None:
    """Call write(file) on a temporary file next to `path`, flush it to disk and rename it: readers of `path`
    see all of the old content or all of the new, whatever happens. DiskError if writing fails."""
    tmp = f"{path}.tmp"
    with writing(path):
        try:
            with io.BufferedWriter(WatchedFile(tmp, "w")) as f:
                try:
                    write(f)
                except RuntimeError as e:
                    raise f.raw.error or e from None
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
            sync(os.path.dirname(path) or ".")  # so that the rename itself reaches the disk
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(tmp)
            raise


def sync(path: str) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str, text: str) -> None:
    write_atomically(path, lambda f: f.write(text.encode()))


def read_json(path: str):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def write_json(path: str, value) -> None:
    write_text(path, json.dumps(value, indent=1))


def make_folder(path: str) -> None:
    with writing(path):
        os.makedirs(path, exist_ok=True)


def append_row(path: str, row: dict) -> None:
    """Append a line of JSON, starting a new line if a kill cut the last one short."""
    with writing(path), open(path, "ab+") as f:
        line = json.dumps(row)
        if f.tell():
            f.seek(-1, os.SEEK_END)
            line = line if f.read(1) == b"\n" else "\n" + line
        f.write((line + "\n").encode())


def read_rows(path: str, strict: bool = True) -> list[dict]:
    """The rows of a .jsonl file; [] if there is no such file. Skips a last line that a kill cut short. Any
    other line that is not JSON is a UserError if `strict`, else skipped."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    rows = []
    for i, line in enumerate(lines):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError:
            if strict and i < len(lines) - 1:
                raise UserError(f"{path}:{i + 1} is not JSON: {line[:60]!r}; fix or remove it") from None
    return rows
