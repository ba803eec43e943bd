"""Files beside the store: arrays written block by block, and work folders that outlive no process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from treemem.storage.files import is_work, map_npy, remove_stale_work, save_npy, work_folder, write_npy


@pytest.mark.parametrize("dtype", ["int8", "float16", "uint64", "int32"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (7,), (6, 3)])
def test_arrays_are_what_numpy_reads(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    save_npy(tmp_path / "a.npy", array)
    blocks = [array[start : start + 2] for start in range(0, len(array), 2)]
    write_npy(tmp_path / "b.npy", array.dtype, shape, blocks)
    np.save(tmp_path / "c.npy", array)
    for name in "ab":
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "c.npy").read_bytes()
        mapped = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        assert mapped.shape == shape
        assert np.array_equal(mapped, array)


def test_a_view_in_another_order_is_written_in_order(tmp_path: Path) -> None:
    array = np.arange(12).reshape(3, 4).T
    save_npy(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)


def test_a_header_with_one_wrong_bit_is_an_array_or_a_value_error(tmp_path: Path) -> None:
    """Python's parser, which reads the header, raises errors of many kinds."""
    path = tmp_path / "a.npy"
    save_npy(path, np.zeros(3, np.int32))
    whole = path.read_bytes()
    refused = 0
    for place in range(128):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                map_npy(path)
            except (ValueError, EOFError):
                refused += 1
    assert refused > 500


def test_too_few_rows_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="2 rows were given for 3"):
        write_npy(tmp_path / "a.npy", np.dtype("int8"), (3,), [np.zeros(2, np.int8)])


def test_a_full_disk_is_told_as_such() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_npy(full, np.zeros(100_000))


def test_a_work_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with work_folder(tmp_path, "growing-") as folder:
        assert is_work(folder.parent)
        (folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), work_folder(tmp_path, "growing-"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def aged(folder: Path, seconds: float = 3600) -> None:
    os.utime(folder, (time.time() - seconds, time.time() - seconds))


def test_folders_of_dead_processes_go_once_they_are_old(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from treemem.storage.files import work_folder\n"
        "with work_folder(Path(sys.argv[1]), 'making-') as f:\n"
        "    (f / 'data').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    remove_stale_work(tmp_path)
    assert left.exists(), "it might have been made a moment ago"
    aged(left)
    remove_stale_work(tmp_path)
    assert not left.exists()


def test_folders_of_live_processes_stay_however_old(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from treemem.storage.files import work_folder\n"
        "with work_folder(Path(sys.argv[1]), 'imaging-') as f:\n"
        "    print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (folder,) = tmp_path.iterdir()
        aged(folder)
        remove_stale_work(tmp_path)
        assert folder.exists()
        process.communicate("")
    assert not folder.exists()


def test_the_folders_of_this_process_stay_too(tmp_path: Path) -> None:
    with work_folder(tmp_path, "making-") as folder:
        aged(folder.parent)
        with work_folder(tmp_path, "making-"):
            assert folder.exists()


def test_other_things_are_left_alone(tmp_path: Path) -> None:
    for name in ("store", "cache", "made", "making", "notes.txt"):
        (tmp_path / name).mkdir()
        aged(tmp_path / name)
    remove_stale_work(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    remove_stale_work(tmp_path / "absent")
