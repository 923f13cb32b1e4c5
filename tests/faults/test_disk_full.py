"""No room on the disk: the message says where and what to do, and the run goes on afterwards."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage_schemas.errors import NoSpace
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.faults.cli import results_at, run_tiny
from tests.storage.tiny_run import results, resume_run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB; half of the tiny run fits."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_and_then_room(
    small_disk: Path,
    home: dict[str, str],
    tiny_config: Path,
    undisturbed_run: dict[str, str],
) -> None:
    url = str(small_disk / "run")
    full = run_tiny(tiny_config, url, home, status=1)
    assert "No space left on device" in full.stderr
    assert f"{url}/" in full.stderr, "which object"
    assert "make room" in full.stderr
    assert "same command" in full.stderr
    assert "Traceback" not in full.stderr
    before = verify(url)
    assert (before.missing, before.damaged) == ((), ())
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run_tiny(tiny_config, url, home)
    assert results_at(url) == undisturbed_run
    assert verify(url).ok


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the write fails with EFBIG (Python ignores the signal)."""
    url = str(tmp_path / "run")
    # Prefect's database is larger than the limit: it is set in the stores' own process alone.
    code = (
        "import resource, sys; from tests.storage.tiny_run import resume_run; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY)); "
        "resume_run(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "NoSpace: [Errno 27] File too large" in last
    assert url in last
    assert "raise the quota or limit" in last
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096
    assert results(resume_run(url).objects) == results(resume_run(str(tmp_path / "w")).objects)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("at", range(0, 60, 6))
def test_the_disk_is_full_at_any_object(
    at: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th synchronisation of a file fails, for n over the whole run."""
    expected = results(resume_run(str(tmp_path / "whole")).objects)
    url = str(tmp_path / "run")
    left = at

    def fsync(descriptor: int) -> None:
        nonlocal left
        if os.path.isfile(f"/proc/self/fd/{descriptor}"):  # noqa: PTH113
            left -= 1
            if left < 0:
                raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(NoSpace, match=rf"{os.strerror(number)}.*/run/.*MB are free there"):
            resume_run(url)
    assert ObjectStore(url).partials() == []
    if ObjectStore(url).exists("run.json"):
        assert verify(RunStore.open(url)).ok
    assert results(resume_run(url).objects) == expected


def test_a_disk_that_is_full_from_the_start(
    small_disk: Path, tiny_config: Path, home: dict[str, str]
) -> None:
    """Not even `run.json` fits: the choice of the place was the caller's mistake."""
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    full = run_tiny(tiny_config, str(small_disk / "run"), home, status=2)
    assert "No space left on device" in full.stderr
    assert "choose another --store" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (small_disk / "run" / "run.json").exists()
