"""Which requests may pause and update a vLLM server."""

from __future__ import annotations

from argparse import Namespace

import pytest

from inference_plugins.vllm.keys import Keys


@pytest.mark.parametrize("shown", [None, "", "Bearer x", "nonsense"])
def test_server_without_a_key_admits_everybody(shown: str | None) -> None:
    assert Keys().admit(shown)
    assert Keys([""]).admit(shown)


@pytest.mark.parametrize("shown", ["Bearer one", "bearer two", "Bearer  one "])
def test_each_of_a_server_s_keys_is_admitted(shown: str) -> None:
    assert Keys(["one", "two"]).admit(shown)


@pytest.mark.parametrize(
    "shown", [None, "", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer ö"]
)
def test_others_are_not(shown: str | None) -> None:
    assert not Keys(["one", "two"]).admit(shown)


@pytest.mark.parametrize(
    ("args", "environ", "admitted"),
    [
        (Namespace(api_key=["one", "two"]), {"VLLM_API_KEY": "three"}, {"one", "two"}),
        (Namespace(api_key="one"), {}, {"one"}),
        (Namespace(api_key=None), {"VLLM_API_KEY": "three"}, {"three"}),
        (Namespace(), {"VLLM_API_KEY": "three"}, {"three"}),
        (Namespace(api_key=[]), {"VLLM_API_KEY": ""}, {"one", "two", "three", "four"}),
    ],
)
def test_keys_are_those_of_the_rest_of_the_server(args: Namespace, environ: dict[str, str], admitted: set[str]) -> None:
    keys = Keys.of_server(args, environ)
    assert {key for key in ("one", "two", "three", "four") if keys.admit(f"Bearer {key}")} == admitted
