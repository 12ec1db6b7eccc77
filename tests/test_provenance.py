"""What a driver's modules were compiled against: the record beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from katagpu import provenance

# The same configuration as Linux 6.12 writes it: in .config, and in the package of headers.
CONFIG = """\
#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_64BIT=y
CONFIG_LOCALVERSION="-nvidia-gpu"
CONFIG_BUILD_SALT=""
# CONFIG_MODVERSIONS is not set
CONFIG_HZ=250
CONFIG_CMDLINE="a=\\"b c\\""
"""
AUTO = """\
#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_HZ=250
CONFIG_BUILD_SALT=
CONFIG_CMDLINE=a="b c"
CONFIG_LOCALVERSION=-nvidia-gpu
CONFIG_64BIT=y
"""


def test_a_configuration_is_the_same_in_both_forms() -> None:
    plain = sorted(line for line in AUTO.splitlines() if line.startswith("CONFIG_"))
    wanted = hashlib.sha256("".join(f"{line}\n" for line in plain).encode()).hexdigest()
    assert provenance.settings(CONFIG) == provenance.settings(AUTO) == wanted


def test_a_setting_more_or_another_value_is_another_configuration() -> None:
    was = provenance.settings(CONFIG)
    assert provenance.settings(CONFIG + "# CONFIG_NUMA is not set\n") == was
    assert provenance.settings(CONFIG + "CONFIG_NUMA=y\n") != was
    assert provenance.settings(CONFIG.replace("HZ=250", "HZ=100")) != was


def test_the_record_of_headers_is_that_of_their_kernel(tmp_path: Path) -> None:
    (tmp_path / "include/config").mkdir(parents=True)
    (tmp_path / "include/config/auto.conf").write_text(AUTO)
    (tmp_path / "config").write_text(CONFIG)
    (tmp_path / "Module.symvers").write_text("0x00000000\t_printk\tvmlinux\tEXPORT_SYMBOL\t\n")
    said = provenance.record(tmp_path)
    assert said == provenance.of(tmp_path / "config", tmp_path / "Module.symvers")
    assert list(provenance.read(said)) == ["settings", "Module.symvers"]


def test_what_is_no_record_says_nothing() -> None:
    assert provenance.read("") == {}
    assert provenance.read("a word\nanother\n") == {}
