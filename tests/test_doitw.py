"""The wrapper, for real, with a toy requirement from a folder: no index and no network."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

MAIN = "import sys\nprint('ran', *sys.argv[1:])\n"
DEBIAN_PYTHON = Path("/usr/bin/python3")


def wheel(directory: Path, version: str) -> str:
    """A wheel `toy` in `directory`; the line of requirements.txt that asks for it."""
    name = f"toy-{version}"
    files = {"toy.py": f"version = {version!r}\n",
             f"{name}.dist-info/METADATA":
                 f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n",
             f"{name}.dist-info/WHEEL":
                 "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
               .rstrip(b"=").decode() for path, text in files.items()}
    files[f"{name}.dist-info/RECORD"] = "".join(
        f"{path},sha256={digests[path]},\n" for path in digests) + f"{name}.dist-info/RECORD,,\n"
    target = directory / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return f"toy=={version} --hash=sha256:{hashlib.sha256(target.read_bytes()).hexdigest()}\n"


@pytest.fixture
def root(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the wrapper, one requirement, and a package that prints its arguments."""
    root = tmp_path / "a repository"
    (root / "katagpu").mkdir(parents=True)
    (root / "wheels").mkdir()
    shutil.copy(repository / "doitw", root)
    (root / "katagpu/__init__.py").touch()
    (root / "katagpu/__main__.py").write_text(MAIN)
    (root / "requirements.txt").write_text(wheel(root / "wheels", "1.0"))
    monkeypatch.setenv("KATAGPU_NO_INSTALL", "1")  # a test changes nothing on the host
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", (root / "wheels").as_uri())
    return root


def doitw(root: Path, *words: str, prefix: tuple[str, ...] = (),
          path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the wrapper from another directory."""
    environment = os.environ if path is None else {**os.environ, "PATH": path}
    return subprocess.run([*prefix, str(root / "doitw"), *words], capture_output=True, text=True,
                          env=environment, cwd="/", check=False)


def version(root: Path) -> str:
    """The version of the toy in the environment."""
    return subprocess.run([root / ".venv/bin/python", "-c", "import toy; print(toy.version)"],
                          capture_output=True, text=True, check=True).stdout.strip()


def test_it_installs_once_and_passes_arguments_on(root: Path) -> None:
    first = doitw(root, "build_image", "a b", "--x=1")
    assert (first.returncode, first.stdout) == (0, "ran build_image a b --x=1\n")
    assert "set up .venv" in first.stderr
    assert version(root) == "1.0"
    second = doitw(root)
    assert (second.returncode, second.stdout, second.stderr) == (0, "ran\n", "")


def test_it_says_where_it_was_called(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doitw(root)
    (root / "katagpu/__main__.py").write_text(
        "import os\nprint(os.environ['KATAGPU_CALLER'], os.environ.get('KATAGPU_STORE'))\n")
    assert doitw(root).stdout == "/ None\n"
    for given, found in (("/var/store", "/var/store"), ("tmp/store", "//tmp/store")):
        monkeypatch.setenv("KATAGPU_STORE", given)
        assert doitw(root).stdout == f"/ {found}\n"


def test_new_requirements_are_installed(root: Path) -> None:
    doitw(root)
    (root / "requirements.txt").write_text(wheel(root / "wheels", "2.0"))
    assert doitw(root).returncode == 0
    assert version(root) == "2.0"


def test_a_wrong_hash_is_refused_and_the_next_run_tries_again(root: Path) -> None:
    good = (root / "requirements.txt").read_text()
    (root / "requirements.txt").write_text(good[:-3] + ("00\n" if good[-3:] != "00\n" else "11\n"))
    bad = doitw(root)
    assert bad.returncode == 1
    assert "pip could not install" in bad.stderr and "hint:" in bad.stderr
    (root / "requirements.txt").write_text(good)
    assert doitw(root).stdout == "ran\n"


def test_killed_while_it_installs_it_installs_again(root: Path) -> None:
    process = subprocess.Popen([root / "doitw"], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (root / ".venv/bin").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / ".venv/stamp").exists()
    assert doitw(root).stdout == "ran\n"
    assert version(root) == "1.0"


def test_two_at_once_install_once(root: Path) -> None:
    both = [subprocess.Popen([root / "doitw"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("set up .venv" in stderr for _, stderr in said) == 1


def test_an_old_python_is_named(root: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sha256sum", "flock", "id", "sh"):
        (tools / name).symlink_to(shutil.which(name) or name)
    (tools / "python3").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    (tools / "python3").chmod(0o755)
    said = doitw(root, path=str(tools))
    assert said.returncode == 1
    assert "Python 3.11 or newer is needed, and here is Python 3.9.2" in said.stderr


def hide(*places: str) -> tuple[str, ...]:
    """A prefix under which directories are empty, in a mount namespace of its own."""
    script = "".join(f"[ ! -d {place} ] || mount -t tmpfs none {place};" for place in places)
    return ("unshare", "--mount", "sh", "-c", f'{script} exec "$@"', "sh")


def debian(*places: str) -> tuple[str, ...]:
    """`hide`, or a skip where that, or the distribution's own Python 3.11, is not there."""
    prefix = hide(*places)
    probe = "import sys; sys.exit(sys.version_info < (3, 11))"
    if not DEBIAN_PYTHON.exists() or subprocess.run(
            [*prefix, DEBIAN_PYTHON, "-c", probe], capture_output=True).returncode:
        pytest.skip("needs root, and the distribution's Python 3.11 or newer")
    return prefix


def library() -> str:
    """Where the distribution's Python keeps ensurepip."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    said = subprocess.run([DEBIAN_PYTHON, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip()
    return f"/usr/lib/python{said}/ensurepip"


SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
WHEELS = "/usr/share/python-wheels"
PACKAGES = "/usr/lib/python3/dist-packages"


def test_without_pip_it_says_the_apt_line(root: Path) -> None:
    said = doitw(root, prefix=debian(library(), WHEELS, PACKAGES), path=SYSTEM_PATH)
    assert said.returncode == 1
    assert "apt-get install -y --no-install-recommends python3-venv" in said.stderr
    assert "KATAGPU_NO_INSTALL=1" in said.stderr
    assert not (root / ".venv").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_sudo_asks_on_a_terminal_only(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool,
) -> None:
    monkeypatch.delenv("KATAGPU_NO_INSTALL")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (("id", "echo 1000"), ("apt-get", "exit 9"), ("sudo", (
            f'echo "$*" >>"{tmp_path}/asked"; [ "$1" != -n ]'))):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    master, slave = os.openpty()
    ends = slave if terminal else subprocess.DEVNULL
    status = subprocess.run(
        [*debian(library(), WHEELS, PACKAGES), str(root / "doitw")], stdin=ends, stderr=ends,
        env={**os.environ, "PATH": f"{tools}:{SYSTEM_PATH}"}, check=False).returncode
    os.close(slave)
    os.close(master)
    asked = (tmp_path / "asked").read_text().splitlines()
    line = "apt-get install -y --no-install-recommends python3-venv"
    assert status == 1  # this sudo installs nothing
    assert asked == (["-n true", line] if terminal else ["-n true"])


@pytest.mark.skipif(not Path(WHEELS).is_dir(), reason="needs python3-pip-whl")
def test_without_ensurepip_the_wheel_of_the_distribution_is_enough(root: Path) -> None:
    said = doitw(root, prefix=debian(library(), PACKAGES), path=SYSTEM_PATH)
    assert said.stdout == "ran\n", said.stderr
    assert version(root) == "1.0"


def test_no_user_or_environment_path_gets_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doitw(root)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    (root / "katagpu/__main__.py").write_text("import sys\nprint('/nowhere' in sys.path)\n")
    assert doitw(root).stdout == "False\n"


def test_with_nothing_to_do_it_starts_one_process(root: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    doitw(root)
    traced = doitw(root, prefix=("strace", "-f", "-e", "trace=execve", "-qq", "-o",
                                 str(root / "trace")))
    assert traced.returncode == 0
    started = [line for line in (root / "trace").read_text().splitlines() if " = 0" in line]
    assert len(started) == 3, started  # sh, sha256sum, and Python in sh's place


def test_the_real_requirements_are_pinned_with_hashes(repository: Path) -> None:
    lines = (repository / "requirements.txt").read_text().splitlines()
    names = [line for line in lines if line and line[0] not in " #"]
    assert all("==" in line and line.endswith("\\") for line in names)
    assert not [line for line in lines if "://" in line or line.startswith("-")]
    wanted = [re.split(r"[\[=]", line)[0] for line in (repository / "requirements.in").read_text()
              .splitlines() if line and line[0] != "#"]
    assert set(wanted) <= {line.split("==")[0] for line in names}
    assert sys.version_info >= (3, 11)
