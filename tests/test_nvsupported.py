"""NVIDIA's list of the GPUs that a package drives."""

from __future__ import annotations

import json

import pytest

from katagpu import nvsupported


def test_ids() -> None:
    chips = [{"devid": "0x20B7", "name": "NVIDIA A30", "features": ["vdpaufeaturesetK"]},
             {"devid": "0x20B7", "subdevid": "0x1804", "name": "NVIDIA A30"},
             {"devid": "0x1EB8", "name": "Tesla T4"}, {"devid": "*", "name": "all others"},
             {"devid": "0x0FC6", "name": "GeForce GTX 650", "legacybranch": "470.xx"}, "word"]
    assert nvsupported.ids(json.dumps({"chips": chips})) == ["1eb8", "20b7"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"chips": {}}', '{"chips": null}',
                                  '{"chips": [{}]}'])
def test_a_list_of_another_form(text: str) -> None:
    assert nvsupported.ids(text) == []
