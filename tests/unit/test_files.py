"""Files are replaced atomically; only regular files are replaced, and no temporary files remain."""

import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import interrupts
import pytest
import torch
from torch import nn

import dsconv
from dsconv import report
from dsconv.files import check_place, replacing

pytestmark = pytest.mark.skipif(os.name == "nt", reason="files as POSIX has them")


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as beside:
        beside.write_text(text)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def special(kind: str, folder: Path) -> Path:
    """Create something that is not a regular file, and return its path."""
    path = folder / kind
    match kind:
        case "folder":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(os.path.relpath(path))
        case "device":
            return Path("/dev/null")
        case "link to a FIFO":
            os.mkfifo(folder / "pipe")
            path.symlink_to("pipe")
        case "link to a device":
            path.symlink_to("/dev/null")
        case "link to itself":
            path.symlink_to(path)
    return path


KINDS = ("folder", "FIFO", "socket", "device", "link to a FIFO", "link to a device", "link to itself")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_and_left(kind: str, tmp_path: Path) -> None:
    path = special(kind, tmp_path)
    before, mode = sorted(os.listdir(tmp_path)), os.lstat(path).st_mode
    for attempt in (check_place, write):
        with pytest.raises(
            OSError, match=kind.rpartition(" ")[2] if "itself" not in kind else "symbolic links"
        ) as caught:
            attempt(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before and os.lstat(path).st_mode == mode


@pytest.mark.parametrize("kind", ["FIFO", "device", "link to a device"])
def test_save_refuses_what_is_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = special(kind, tmp_path)
    mode = os.stat(path).st_mode
    with pytest.raises(OSError, match=str(path)):
        dsconv.save(dsconv.quantize(nn.Conv2d(3, 4, 3)), path)
    assert os.stat(path).st_mode == mode


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "a.txt", tmp_path / "link.txt"
    target.write_text("old")
    (tmp_path / "between").symlink_to("far/a.txt")
    link.symlink_to("between")
    write(link)
    assert link.is_symlink() and target.read_text() == "new" and os.listdir(target.parent) == ["a.txt"]


def test_a_link_to_nothing_creates_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("there")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"
    (tmp_path / "lost").symlink_to("no/where")
    with pytest.raises(FileNotFoundError, match="no does not exist"):
        write(tmp_path / "lost")


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_replaced_file_keeps_its_permissions(mode: int, tmp_path: Path, umask: None) -> None:
    path = tmp_path / "net.safetensors"
    path.touch()
    path.chmod(mode)
    dsconv.save(dsconv.quantize(nn.Conv2d(3, 4, 3)), path)
    assert path.stat().st_size and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_follows_the_umask(tmp_path: Path, umask: None) -> None:
    write(tmp_path / "a.txt")
    net = dsconv.save(dsconv.quantize(nn.Conv2d(3, 4, 3)), tmp_path / "net.safetensors")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a.txt", net)] == [0o640, 0o640]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_write_protected_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="write-protected"):
        write(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("length", [252, 255])
def test_names_may_be_as_long_as_the_system_allows(length: int, tmp_path: Path) -> None:
    qnet = dsconv.quantize(nn.Conv2d(3, 4, 3))
    for name in ("x" * (length - len(".safetensors")) + ".safetensors", "x." + "y" * (length - 2), "ü" * (length // 2)):
        assert dsconv.load(dsconv.save(qnet, tmp_path / name), nn.Conv2d(3, 4, 3))
    assert len(os.listdir(tmp_path)) == 3


def test_names_may_hold_any_bytes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.txt"))
    write(path)
    assert path.read_text() == "new" and len(os.listdir(tmp_path)) == 1
    for attempt in (lambda: dsconv.save(dsconv.quantize(nn.Conv2d(3, 4, 3)), path), lambda: dsconv.load(path)):
        with pytest.raises(OSError, match="UTF-8"):
            attempt()
    assert path.read_text() == "new" and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_what_is_no_name_of_a_file_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="expected the name of a file"):
        write(tmp_path / name)


def test_many_threads_may_save_to_one_path(tmp_path: Path) -> None:
    qnet, path = dsconv.quantize(nn.Conv2d(3, 4, 3)), tmp_path / "net.safetensors"
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: dsconv.save(qnet, path), range(120))) == [path] * 120
    assert os.listdir(tmp_path) == [path.name]
    assert dsconv.load(path, nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3), OSError("full"), OSError(28, "")]
)
def test_nothing_is_left_of_what_failed(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as beside:
            beside.write_text("half of it")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@contextmanager
def no_space(size: int) -> Iterator[None]:
    """Limit files to ``size`` bytes within the context; the error differs from that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path, net = tmp_path / "a.svg", nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    path.write_text("old")
    qnet = dsconv.quantize(net)
    attempts: dict[str, Any] = {
        "text": lambda: write(path, "x" * 100_000),
        "save": lambda: dsconv.save(qnet, path),
        "picture": lambda: report.draw(path, net, {"W4": qnet}, {"W4": {"0": 1.0}}, layers=["0"]),
    }
    for name, attempt in attempts.items():
        with no_space(5000), pytest.raises(OSError, match="too large") as caught:
            attempt()
        assert str(path) in str(caught.value), name
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.svg"], name


def test_an_error_about_another_file_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a.txt"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_nothing_is_left_of_what_was_ended(name: str, code: int, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from dsconv import stopping\n"
        "from dsconv.files import replacing\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        "    with stopping.stoppable(), replacing(Path(sys.argv[1])) as beside:\n"
        "        beside.write_text('half of it')\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(stopping.exit_code())\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=interrupts.heeded)
    assert done.returncode == code and not done.stderr and not os.listdir(tmp_path)


def test_a_folder_of_the_hub_is_replaced_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra dsconv[hub]")
    from dsconv import hub

    (tmp_path / "config.json").write_text("old")
    monkeypatch.setattr(hub, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.DSConvModel(dsconv.quantize(nn.Conv2d(3, 4, 3))).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["config.json"]
    assert torch.is_grad_enabled()
