"""The systemd unit: known directives, systemd's own check, and times that fit the server's."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from jaxllama_serving.process.server import CLOSE_TIMEOUT_S
from unit.deploy.files import ROOT, UNIT, command_of_unit, parse

# Source: systemd.unit(5), systemd.service(5), systemd.exec(5), systemd.kill(5). Those in use, and their neighbours.
KNOWN = {
    "Unit": {"Description", "Documentation", "Wants", "Requires", "After", "StartLimitIntervalSec", "StartLimitBurst"},
    "Service": {
        *("Type", "User", "Group", "EnvironmentFile", "Environment", "ExecStart", "ExecStartPre", "ExecStop"),
        *("WorkingDirectory", "CacheDirectory", "CacheDirectoryMode", "StateDirectory", "RuntimeDirectory"),
        *("KillSignal", "KillMode", "TimeoutStopSec", "TimeoutStartSec", "Restart", "RestartSec"),
        *("RestartPreventExitStatus", "SuccessExitStatus", "LimitMEMLOCK", "LimitNOFILE", "UMask"),
        *("NoNewPrivileges", "CapabilityBoundingSet", "ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices"),
        *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups"),
        *("ProtectHostname", "ProtectClock", "ProtectProc", "RestrictNamespaces", "RestrictRealtime"),
        *("RestrictSUIDSGID", "RestrictAddressFamilies", "LockPersonality", "SystemCallArchitectures"),
        *("SystemCallFilter", "MemoryDenyWriteExecute", "DeviceAllow", "DevicePolicy"),
    },
    "Install": {"WantedBy", "Alias"},
}
# systemd.exec(5): each leaves only the devices it lists; ProtectClock implies a DeviceAllow.
HIDES_THE_TPU = {"PrivateDevices", "ProtectClock", "DeviceAllow", "DevicePolicy"}


def directives(text: str) -> dict[str, str]:
    """The [Service] section. Raises: AssertionError for a line that no directive, section or comment is."""
    section, found = "", {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]")
            assert section in KNOWN, f"unknown section {line}"
            continue
        name, equals, value = line.partition("=")
        assert equals, f"no directive: {line}"
        assert name in KNOWN[section], f"unknown directive {name} in [{section}]"
        if section == "Service":
            assert name not in found, f"{name} twice"
            found[name] = value.strip()
    return found


def check(text: str) -> None:
    """What the comments of the unit promise."""
    service, args = directives(text), parse(command_of_unit(text))
    assert float(service["TimeoutStopSec"]) > args.drain_timeout + CLOSE_TIMEOUT_S, "killed before it has drained"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2", "bad input is retried for ever"
    assert not service["EnvironmentFile"].startswith("-"), "starts without keys"
    assert args.compilation_cache.startswith(f"/var/cache/{service['CacheDirectory']}/"), "the cache cannot be written"
    assert service["User"] not in ("", "root")
    assert service["LimitMEMLOCK"] == "infinity"
    assert not HIDES_THE_TPU & set(service), "the TPU is hidden"


def test_the_unit_keeps_its_promises():
    check(UNIT.read_text())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("TimeoutStopSec=150", "TimeoutStopSec=90", "drained"),
        ("--drain-timeout 120", "--drain-timeout 300", "drained"),
        ("Restart=on-failure", "Restrat=on-failure", "unknown directive Restrat"),
        ("[Install]", "[Instal]", "unknown section"),
        ("EnvironmentFile=", "EnvironmentFile=-", "keys"),
        ("--compilation-cache /var/cache/jaxllama", "--compilation-cache /var/tmp", "cache"),
        ("PrivateTmp=yes", "PrivateTmp=yes\nProtectClock=yes", "TPU"),
    ],
)
def test_a_broken_unit_is_found(old, new, message):
    text = UNIT.read_text()
    assert old in text
    with pytest.raises(AssertionError, match=message):
        check(text.replace(old, new))


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def verify(text: str, tmp_path) -> str:
    """What `systemd-analyze verify` says; the program it starts is not installed here, so /bin/true stands for it."""
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace("/opt/jaxllama/bin/jaxllama", "/bin/true"))
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    return found.stdout + found.stderr


@needs_systemd
def test_systemd_takes_the_unit(tmp_path):
    assert verify(UNIT.read_text(), tmp_path) == ""


@needs_systemd
@pytest.mark.parametrize("broken", ["RestartSec=5x", "ProtectSystm=strict", "KillMode=mixt"])
def test_systemd_finds_a_fault(tmp_path, broken):
    assert UNIT.name in verify(UNIT.read_text().replace("UMask=0077", broken), tmp_path)


def test_the_tutorial_installs_the_keys_for_root_alone():
    path = directives(UNIT.read_text())["EnvironmentFile"]
    assert (
        f"install -D -m 600 -o root -g root /dev/stdin {path}"
        in (ROOT / "docs" / "tutorials" / "tpu-vm.md").read_text()
    )
