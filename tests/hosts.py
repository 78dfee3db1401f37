"""Hosts on this machine: each has a network, processes and disks of its own, an sshd, and a cable to a bridge."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import psutil
from conftest import wait_until

ROOT = Path(__file__).parent.parent
USER = "ubuntu"
_NETWORK = "10.214.0"
_BRIDGE = "quire-hosts"
_PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "nft": "nftables",
    "ip": "iproute2",
    "unshare": "util-linux",
}


def run(*command: str, check: bool = True) -> str:
    """What a command says."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)
    assert not (check and done.returncode), f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def what_is_missing() -> str | None:
    """For hosts on this machine; None: nothing."""
    if os.geteuid() != 0:
        return "root, who alone makes network namespaces"
    if absent := [package for tool, package in _PACKAGES.items() if shutil.which(tool) is None]:
        return f"packages: apt-get install {' '.join(absent)}"
    tried = "ip link add type veth && ip link add type bridge && nft add table inet cut && mount -t tmpfs none /mnt"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", tried],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"leave to make namespaces, links, filters and mounts: {done.stderr.strip()}" if done.returncode else None


class Host:
    """One. Its user is root by another name, for Python may lie where only root reads."""

    def __init__(self, number: int, folder: Path) -> None:
        """`folder`: of all hosts, with a key."""
        self.address = f"{_NETWORK}.{number}"
        self.key = folder / "key"
        self._home = folder / "home"  # the same path on every host
        self._folder = folder / f"host-{number}"
        self._cable = f"quire-host-{number}"
        self._prepare()
        self.boot()

    def _prepare(self) -> None:
        ssh = self._folder / "home" / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        (self._folder / "tmp").mkdir()
        self._home.mkdir(exist_ok=True)
        shutil.copy(self.key.with_suffix(".pub"), ssh / "authorized_keys")
        entry = f"{USER}:*:0:0::{self._home}:/bin/bash\n"  # first, for it is looked up by its number, too
        (self._folder / "passwd").write_text(entry + Path("/etc/passwd").read_text())
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / "host_key"))
        settings = {
            "HostKey": self._folder / "host_key",
            "PermitRootLogin": "yes",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "PidFile": "none",
            "MaxStartups": "100",
        }
        (self._folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))

    def boot(self) -> None:
        """With disks as they were left. Its sshd is the first of its processes; all of it ends with this process."""
        disks = [
            f"mount --bind {self._folder}/home {self._home}",
            f"mount --bind {self._folder}/tmp /tmp",
            f"mount --bind {self._folder}/passwd /etc/passwd",
            "mount -t tmpfs shm /dev/shm",
            "mount -t tmpfs run /run",
            "mkdir /run/sshd",
            f"exec {shutil.which('sshd')} -D -E {self._folder}/sshd.log -f {self._folder}/sshd_config",
        ]
        network = [
            f"ip link add eth0 type veth peer name {self._cable} netns {os.getpid()}",
            f"ip addr add {self.address}/24 dev eth0",
            "ip link set lo up",
            "ip link set eth0 up",
            "ip route add default dev eth0",  # Ray looks there for its own address; nobody is there
            f"exec unshare --mount --pid --fork --kill-child --mount-proc sh -c '{' && '.join(disks)}'",
        ]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", " && ".join(network)],
            stdin=subprocess.DEVNULL,
        )
        wait_until(lambda: Path(f"/sys/class/net/{self._cable}").exists() or self._process.poll() is not None)
        run("ip", "link", "set", self._cable, "master", _BRIDGE, "up")
        wait_until(lambda: "yes" in self.ssh("echo yes", check=False) or self._process.poll() is not None)
        assert self._process.poll() is None, "it did not boot"

    def _inside(self, *command: str) -> str:
        """Of the machine's own programs, in its network."""
        return run("nsenter", f"--net=/proc/{self._process.pid}/ns/net", *command)

    def ssh(self, command: str, *, check: bool = True) -> str:
        """As its user."""
        known = ["-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oLogLevel=ERROR"]
        return run("ssh", "-i", str(self.key), *known, f"{USER}@{self.address}", command, check=check)

    def cut_off(self) -> None:
        """Nothing comes in or goes out, and nobody is told."""
        self._inside("nft", "add", "table", "inet", "cut")
        for hook, direction in (("input", "iif"), ("output", "oif")):
            self._inside("nft", f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; policy drop; }}")
            self._inside("nft", "add", "rule", "inet", "cut", hook, direction, "lo", "accept")

    def mend(self) -> None:
        """What was cut."""
        self._inside("nft", "delete", "table", "inet", "cut")

    def power_off(self) -> None:
        """Every process of it is gone at once, and nobody is told."""
        if Path(f"/sys/class/net/{self._cable}").exists():
            run("ip", "link", "delete", self._cable)
        for first in psutil.Process(self._process.pid).children():
            first.kill()
        self._process.wait(60)


class Hosts:
    """Several, and the machine their operator sits at: this one."""

    def __init__(self, count: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="quire-hosts-", dir="/var/tmp"))
        self.all: list[Host] = []
        try:
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
            run("ip", "link", "add", _BRIDGE, "type", "bridge", check=False)  # one that is there was left by a kill
            run("ip", "addr", "replace", f"{_NETWORK}.254/24", "dev", _BRIDGE)
            run("ip", "link", "set", _BRIDGE, "up")
            for number in range(1, count + 1):
                self.all.append(Host(number, self.folder))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves nothing."""
        for host in self.all:
            host.power_off()
        run("ip", "link", "delete", _BRIDGE, check=False)
        shutil.rmtree(self.folder)


def setup_command() -> str:
    """In place of what downloads everything, which hosts without a way out cannot: the packages of this Python, and the
    repository as it came to the host."""
    packages = Path(sysconfig.get_paths()["purelib"]).resolve()  # /tmp is each host's own
    python = Path(sys.prefix).resolve() / "bin/python"
    site = f".venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    rooms = " ".join(f"$PWD/{room}" for room in ("cluster", "engine", "kernels", "protos"))
    scripts = {"ray": "ray.scripts.scripts", "quire": "quire.cli.main"}
    made = " && ".join(
        f"printf '#!%s/.venv/bin/python\\nimport sys\\nfrom {module} import main\\nsys.exit(main())\\n' $PWD"
        f" > .venv/bin/{name} && chmod +x .venv/bin/{name}"
        for name, module in scripts.items()
    )
    return (
        f"cd ~/quire && test -x .venv/bin/quire || ({python} -m venv --without-pip .venv"
        f" && printf '%s\\n' {rooms} {packages} > {site}/here.pth && {made})"
    )
